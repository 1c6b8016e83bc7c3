// forward and backward: check everything, drop the GIL, call down.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/python.h"
#include "moe/layer.h"
#include "moe/plan.h"
#include "weights/experts.h"

namespace py = pybind11;

namespace kt {

namespace {

using Scaling = std::array<float, 3>;
using LoraTensors = std::array<py::object, 6>;  // A and B of gate, up and down, or None

// One LoRA matrix of every expert; the rank is wherever `meaning` has it.
StridedBatch read_batch(py::handle object, const std::string& name, index_t experts, index_t rows,
                        index_t cols, const char* meaning) {
  const Tensor t = read_tensor(object, name, {DType::f32, DType::bf16}, 3);
  check_shape(t, name, {experts, rows < 0 ? t.dim(1) : rows, cols < 0 ? t.dim(2) : cols}, meaning);
  return {t.data, t.dtype, t.dim(1), t.dim(2)};
}

LoraPair read_pair(const ExpertWeights& w, Projection p, py::handle a, py::handle b, float scaling) {
  const std::string name = std::string(name_of(p)) + "_lora_";
  KT_CHECK(a.is_none() == b.is_none(), "{} is given without {}", name + (a.is_none() ? "b" : "a"),
           name + (a.is_none() ? "a" : "b"));
  if (a.is_none()) return {};
  KT_CHECK(w.gated || p != Projection::gate, "{}a is given, but the experts have no gate: wanted None", name);
  const bool down = p == Projection::down;
  const index_t rows = w.rows(p), cols = w.cols(p);
  LoraPair pair{
      read_batch(a, name + "a", w.num_experts, -1, cols, down ? "[E, r, I]" : "[E, r, H]"), {}, scaling};
  KT_CHECK(pair.rank() > 0, "{}a has rank 0, wanted at least 1 (or None)", name);
  pair.b = read_batch(b, name + "b", w.num_experts, rows, pair.rank(),
                      down ? "[E, H, r] with the rank of down_lora_a" : "[E, I, r] with the rank of its A");
  return pair;
}

// The ids are copied, into `kept_ids`: they are read more than once, and whoever changes them meanwhile shall
// get odd numbers, not somebody else's memory.
LayerInputs read_inputs(const ExpertWeights& w, py::handle hidden_states, py::handle topk_ids,
                        py::handle topk_weights, const LoraTensors& lora, const Scaling& scaling,
                        double dropout, std::uint64_t seed, std::vector<char>& kept_ids) {
  const Tensor x = read_tensor(hidden_states, "hidden_states", {DType::bf16}, 2);
  const Tensor ids = read_tensor(topk_ids, "topk_ids", {DType::i64, DType::i32}, 2);
  const Tensor weights = read_tensor(topk_weights, "topk_weights", {DType::f32}, 2);
  KT_CHECK(x.dim(1) == w.hidden, "hidden_states has shape {}, wanted [T, {}]: the experts' hidden size",
           shape_text(x.shape), w.hidden);
  KT_CHECK(ids.dim(0) == x.dim(0), "topk_ids has shape {}, wanted [{}, K]: a row for every token",
           shape_text(ids.shape), x.dim(0));
  KT_CHECK(dropout >= 0.0f && dropout < 1.0f, "dropout is {}, wanted a probability in [0, 1)", dropout);
  check_shape(weights, "topk_weights", {ids.dim(0), ids.dim(1)}, "the shape of topk_ids");
  const auto* first_id = static_cast<const char*>(ids.data);
  kept_ids.assign(first_id, first_id + ids.bytes());
  const MatView kept = view(kept_ids.data(), ids.dtype, ids.dim(0), ids.dim(1));
  LayerInputs inputs{x.matrix(), kept, weights.matrix(), {}, {dropout, seed}};
  for (const Projection p : projections) {
    const std::size_t i = index_of(p);
    inputs.lora[i] = read_pair(w, p, lora[2 * i], lora[2 * i + 1], scaling[i]);
  }
  return inputs;
}

Saved read_saved(const py::object& saved, const ExpertWeights& w, const LayerInputs& inputs) {
  if (saved.is_none()) return {};
  const Tensor t = read_tensor(saved, "saved", {DType::bf16}, 2);
  const index_t routes = count_routes(inputs.topk_ids, w.num_experts);
  index_t ranks = 0;
  for (const LoraPair& pair : inputs.lora) ranks += pair.rank();
  const index_t inner = std::ssize(x_projections_of(w.gated)) * w.intermediate;
  check_shape(t, "saved", {routes, inner + ranks},
              w.gated ? "[routes, 2 I + the three ranks]" : "[routes, I + the two ranks]");
  auto* rest = static_cast<bf16_t*>(t.data);
  const auto take = [&](index_t width) { return std::exchange(rest, rest + routes * width); };
  Saved kept;
  if (w.gated) kept.gate = take(w.intermediate);
  kept.up = take(w.intermediate);
  for (const Projection p : projections) kept.p[index_of(p)] = take(inputs.of(p).rank());
  return kept;
}

Result read_result(const py::object& tensor, const std::string& name, const std::vector<index_t>& shape) {
  if (tensor.is_none()) return {};
  const Tensor t = read_tensor(tensor, name, {DType::bf16, DType::f32}, shape.size());
  KT_CHECK(t.shape == shape, "{} has shape {}, wanted {}", name, shape_text(t.shape), shape_text(shape));
  return {t.data, t.dtype};
}

void run_forward(const Experts& experts, py::handle hidden_states, py::handle topk_ids,
                 py::handle topk_weights, const LoraTensors& lora, const Scaling& scaling, double dropout,
                 std::uint64_t seed, const py::object& saved, const py::object& out) {
  const ExpertWeights& w = experts.weights();
  std::vector<char> kept_ids;
  const LayerInputs inputs =
      read_inputs(w, hidden_states, topk_ids, topk_weights, lora, scaling, dropout, seed, kept_ids);
  const Saved kept = read_saved(saved, w, inputs);
  KT_CHECK(!out.is_none(), "out is None, wanted a tensor");
  const Result result = read_result(out, "out", {inputs.hidden_states.rows, w.hidden});
  const kt::ReleaseGil release;
  forward(experts.runtime(), w, inputs, kept, result);
}

void run_backward(const Experts& experts, py::handle hidden_states, py::handle topk_ids,
                  py::handle topk_weights, const LoraTensors& lora, const Scaling& scaling, double dropout,
                  std::uint64_t seed, const py::object& saved, py::handle grad_out,
                  const py::object& grad_hidden, const py::object& grad_weights, const LoraTensors& grad_lora,
                  bool clear_idle) {
  const ExpertWeights& w = experts.weights();
  std::vector<char> kept_ids;
  const LayerInputs inputs =
      read_inputs(w, hidden_states, topk_ids, topk_weights, lora, scaling, dropout, seed, kept_ids);
  const Saved kept = read_saved(saved, w, inputs);
  const Tensor dout = read_tensor(grad_out, "grad_out", {DType::bf16}, 2);
  check_shape(dout, "grad_out", {inputs.hidden_states.rows, w.hidden}, "[T, H]");

  LayerGradients gradients;
  gradients.clear_idle = clear_idle;
  gradients.hidden_states = read_result(grad_hidden, "grad_hidden", {inputs.hidden_states.rows, w.hidden});
  if (!grad_weights.is_none()) {
    const Tensor dw = read_tensor(grad_weights, "grad_weights", {DType::f32}, 2);
    check_shape(dw, "grad_weights", {inputs.topk_weights.rows, inputs.topk_weights.cols}, "[T, K]");
    gradients.topk_weights = static_cast<float*>(dw.data);
  }
  for (const Projection p : projections) {
    const std::size_t i = index_of(p);
    const LoraPair& pair = inputs.of(p);
    const std::string name = "grad of " + std::string(name_of(p)) + "_lora_";
    gradients.lora_a[i] =
        read_result(grad_lora[2 * i], name + "a", {w.num_experts, pair.a.rows, pair.a.cols});
    gradients.lora_b[i] =
        read_result(grad_lora[2 * i + 1], name + "b", {w.num_experts, pair.b.rows, pair.b.cols});
  }
  const kt::ReleaseGil release;
  backward(experts.runtime(), w, inputs, kept, dout.matrix(), gradients);
}

MatView read_ids(py::handle topk_ids) {
  return read_tensor(topk_ids, "topk_ids", {DType::i64, DType::i32}, 2).matrix();
}

std::vector<std::int32_t> routes_of_each(py::handle topk_ids, int num_experts) {
  return count_routes_of_each(read_ids(topk_ids), num_experts);
}

void sorted_routes(py::handle topk_ids, int num_experts, const std::vector<int>& experts, py::handle into) {
  const MatView ids = read_ids(topk_ids);
  const Tensor to = read_tensor(into, "into", {DType::i32}, 1);
  const index_t entries = ids.rows * ids.cols, rows = to.dim(0) - entries;
  KT_CHECK(rows >= 0, "into has {} entries, wanted at least those of topk_ids, {}", to.dim(0), entries);
  auto* data = static_cast<std::int32_t*>(to.data);
  sort_routes(ids, num_experts, experts, {data + entries, to_size(rows)}, {data, to_size(entries)});
}

}  // namespace

}  // namespace kt

void bind_layer(py::module_& m) {
  m.def("count_routes", &kt::routes_of_each, py::arg("topk_ids"), py::arg("num_experts"));
  m.def("sort_routes", &kt::sorted_routes, py::arg("topk_ids"), py::arg("num_experts"), py::arg("experts"),
        py::arg("into"));
  m.def("forward", &kt::run_forward, py::arg("experts"), py::arg("hidden_states"), py::arg("topk_ids"),
        py::arg("topk_weights"), py::arg("lora"), py::arg("scaling"), py::arg("dropout"), py::arg("seed"),
        py::arg("saved"), py::arg("out"));
  m.def("backward", &kt::run_backward, py::arg("experts"), py::arg("hidden_states"), py::arg("topk_ids"),
        py::arg("topk_weights"), py::arg("lora"), py::arg("scaling"), py::arg("dropout"), py::arg("seed"),
        py::arg("saved"), py::arg("grad_out"), py::arg("grad_hidden"), py::arg("grad_weights"),
        py::arg("grad_lora"), py::arg("clear_idle") = true);
}
