#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "bindings/python.h"
#include "kernels/registry.h"
#include "weights/loader.h"

namespace py = pybind11;
using namespace py::literals;

namespace kt {

namespace {

constexpr auto kFloats = {DType::bf16, DType::f16, DType::f32};

// The memory format of a layer's three matrices.
std::array<WeightType, 3> types_of(Format format) {
  const WeightType type = traits_of(format).quantized;
  return {type, type, type};
}

using Popularity = std::optional<std::vector<double>>;

ShardingOptions sharding_options(const std::string& placement, Popularity popularity) {
  KT_CHECK(!popularity || !popularity->empty(), "popularity has no numbers, wanted one an expert");
  return {placement_from(placement), std::move(popularity).value_or(std::vector<double>{})};
}

std::shared_ptr<Experts> from_tensors(py::handle gate, py::handle up, py::handle down, py::handle gate_bias,
                                      py::handle up_bias, py::handle down_bias, const std::string& activation,
                                      const std::string& format, std::shared_ptr<Runtime> runtime,
                                      const std::string& placement, Popularity popularity) {
  const bool gated = !gate.is_none();
  const std::array objects{gate, up, down};
  std::array<Tensor, 3> tensors;
  for (const Projection p : projections_of(gated))
    tensors[index_of(p)] = read_tensor(objects[index_of(p)], std::string(name_of(p)), kFloats, 3);
  const Projection first_p = projections_of(gated).front();
  const std::string first(name_of(first_p));
  const Tensor& inner = tensors[index_of(first_p)];
  const index_t e = inner.dim(0), i = inner.dim(1), h = inner.dim(2);
  KT_CHECK(e > 0 && i > 0 && h > 0, "{} has shape {}, wanted [E, I, H] with no dimension 0", first,
           shape_text(inner.shape));
  constexpr index_t kMostExperts = 1'000'000;
  KT_CHECK(e <= kMostExperts, "{} has {} experts, wanted at most {}", first, e, kMostExperts);
  check_shape(tensors[1], "up", {e, i, h}, "[E, I, H] of gate");
  check_shape(tensors[2], "down", {e, h, i}, message("[E, H, I] of {}'s [E, I, H]", first));
  Biases biases;
  const auto read_bias = [&](Projection p, py::handle bias, index_t rows, const std::string& meaning) {
    if (bias.is_none()) return;
    const std::string name = std::string(name_of(p)) + "_bias";
    const Tensor tensor = read_tensor(bias, name, kFloats, 2);
    check_shape(tensor, name, {e, rows}, meaning);
    biases[index_of(p)] = tensor.matrix();
  };
  const std::string of_weights = message(" of {}'s [E, I, H]", first);
  KT_CHECK(gated || gate_bias.is_none(), "gate_bias is given, but gate is None");
  read_bias(Projection::gate, gate_bias, i, "[E, I]" + of_weights);
  read_bias(Projection::up, up_bias, i, "[E, I]" + of_weights);
  read_bias(Projection::down, down_bias, h, "[E, H]" + of_weights);
  const Activation act = activation_from(activation);
  const LayerShape layer{to_int(e), h, i, types_of(format_from(format)), gated};
  const ShardingOptions sharding = sharding_options(placement, std::move(popularity));

  const kt::ReleaseGil release;
  const auto matrices = [&](int expert, Projection p) {
    const Tensor& t = tensors[index_of(p)];
    return StridedBatch{t.data, t.dtype, t.dim(1), t.dim(2)}[expert];
  };
  return experts_from_matrices(std::move(runtime), layer, act, matrices, biases, sharding);
}

// A Report of no bytes: lets Ctrl-C end the work.
void check_signals(std::size_t) {
  with_gil([] { return PyErr_CheckSignals() == 0 ? Py_NewRef(Py_None) : nullptr; });
}

std::shared_ptr<Experts> from_checkpoint(std::shared_ptr<const ExpertIndex> index, int layer,
                                         const std::string& activation, const std::string& format,
                                         std::shared_ptr<Runtime> runtime,
                                         const std::optional<std::filesystem::path>& cache_dir, bool paged,
                                         const std::optional<std::filesystem::path>& shared_dir,
                                         const py::object& progress, const std::string& placement,
                                         Popularity popularity,
                                         const std::optional<std::array<index_t, 2>>& experts) {
  LoadOptions options;
  options.activation = activation_from(activation);
  if (format != "as-stored") options.format = format_from(format);
  options.cache_dir = cache_dir;
  options.paged = paged;
  options.shared_dir = shared_dir;
  options.sharding = sharding_options(placement, std::move(popularity));
  if (experts) options.experts = Range{(*experts)[0], (*experts)[1]};
  options.warn = [](const std::string& text) {
    with_gil([&] {
      const bool warned = PyErr_WarnEx(PyExc_UserWarning, text.c_str(), /*stack_level=*/2) == 0;
      return warned ? Py_NewRef(Py_None) : nullptr;
    });
  };
  const Report report = [&](std::size_t bytes) {
    check_signals(0);
    if (bytes == 0 || progress.is_none()) return;
    with_gil([&] { return PyObject_CallFunction(progress.ptr(), "n", static_cast<Py_ssize_t>(bytes)); });
  };
  const kt::ReleaseGil release;
  return experts_from_checkpoint(std::move(runtime), std::move(index), layer, options, report);
}

void dequantize(const Experts& experts, py::handle gate, py::handle up, py::handle down) {
  const ExpertWeights& w = experts.weights();
  const std::array targets{gate, up, down};
  std::array<bf16_t*, 3> memory;
  KT_CHECK(w.gated || gate.is_none(), "gate is given, but the experts have none: wanted None");
  for (const Projection p : projections_of(w.gated)) {
    const std::string name(name_of(p));
    const Tensor target = read_tensor(targets[index_of(p)], name, {DType::bf16}, 3);
    check_shape(target, name, {w.num_experts, w.rows(p), w.cols(p)}, "[E, rows, cols]");
    memory[index_of(p)] = static_cast<bf16_t*>(target.data);
  }
  const kt::ReleaseGil release;
  for (const Projection p : projections_of(w.gated)) experts.dequantize(p, memory[index_of(p)]);
}

// Whether the weights of a packed layer are those that were written.
bool verify(const Experts& experts) {
  const kt::ReleaseGil release;
  return experts.verify(&check_signals);
}

bool rebalance(Experts& experts, const Popularity& popularity) {
  KT_CHECK(!popularity || !popularity->empty(), "popularity has no numbers, wanted one an expert");
  const kt::ReleaseGil release;
  return experts.rebalance(popularity ? std::span<const double>(*popularity) : std::span<const double>{});
}

void routed(const Experts& experts, py::handle into) {
  const Tensor target = read_tensor(into, "into", {DType::i64}, 1);
  check_shape(target, "into", {experts.weights().num_experts}, "[E]");
  const kt::ReleaseGil release;
  std::ranges::copy(experts.routed(), static_cast<std::int64_t*>(target.data));
}

// A part of a projection of every expert: shapes and format once, then an address for each expert.
py::dict stored_slice(const ExpertWeights& w, Projection p, std::size_t part, Range slice) {
  const auto experts = to_size(w.num_experts);
  const auto& all = w.weights[index_of(p)];
  const std::span<const Weight> matrices(all.begin() + static_cast<std::ptrdiff_t>(part * experts), experts);
  const auto addresses = [&](const std::byte* Weight::* member) {
    std::vector<std::uintptr_t> at;
    for (const Weight& matrix : matrices) at.push_back(reinterpret_cast<std::uintptr_t>(matrix.*member));
    return at;
  };
  const Weight& any = matrices.front();
  return py::dict("first"_a = slice.begin, "last"_a = slice.end, "rows"_a = any.rows, "cols"_a = any.cols,
                  "code"_a = name_of(traits_of(any.type.format).codes), "scale"_a = name_of(any.type.scale),
                  "scale_rows"_a = any.type.scale_rows, "scale_cols"_a = any.group(),
                  "codes_bytes"_a = any.codes_bytes(), "scales_bytes"_a = any.scales_bytes(),
                  "zeros_bytes"_a = any.zeros_bytes(), "global_scale_bytes"_a = any.global_scale_bytes(),
                  "codes"_a = addresses(&Weight::codes), "scales"_a = addresses(&Weight::scales),
                  "zeros"_a = addresses(&Weight::zeros), "global_scale"_a = addresses(&Weight::global_scale),
                  "divides"_a = any.type.global_scale == GlobalScale::divides);
}

// For gate, up and down: the slices that are not empty; none of a gate that there is not. Addresses never
// change.
std::array<py::list, 3> weights_at(const Experts& experts) {
  const ExpertWeights& w = experts.weights();
  std::array<py::list, 3> stored;
  for (const Projection p : projections_of(w.gated)) {
    py::list& slices = stored[index_of(p)];
    if (!w.split()) {
      slices.append(stored_slice(w, p, 0, {0, w.intermediate}));
      continue;
    }
    for (std::size_t s = 0; s < w.shards.size(); ++s)
      if (w.shards[s].size() > 0) slices.append(stored_slice(w, p, s, w.shards[s]));
  }
  return stored;
}

// Whether the projection has a bias, which is copied to a tensor if one is given.
bool bias(const Experts& experts, const std::string& projection, const py::object& into) {
  const ExpertWeights& w = experts.weights();
  for (const Projection p : projections) {
    if (name_of(p) != projection) continue;
    const bf16_t* all = w.biases[index_of(p)];
    if (all == nullptr || into.is_none()) return all != nullptr;
    const Tensor target = read_tensor(into, "into", {DType::bf16}, 2);
    check_shape(target, "into", {w.num_experts, w.rows(p)}, "[E, rows]");
    std::copy_n(all, w.num_experts * w.rows(p), static_cast<bf16_t*>(target.data));
    return true;
  }
  throw ValueError(message("projection is \"{}\", wanted gate, up or down", projection));
}

// (wanted, elsewhere, unknown) of each shard.
std::vector<std::array<index_t, 3>> page_nodes(const Experts& experts) {
  const kt::ReleaseGil release;
  std::vector<std::array<index_t, 3>> shards;
  for (const PageNodes& n : experts.page_nodes()) shards.push_back({n.wanted, n.elsewhere, n.unknown});
  return shards;
}

// Relative L2 error of gate, up and down, or None.
py::object quantization_error(const Experts& experts) {
  if (!experts.errors()) return py::none();
  py::dict errors;
  for (const Projection p : projections_of(experts.weights().gated)) {
    const auto& [error, norm] = (*experts.errors())[index_of(p)];
    errors[py::str(std::string(name_of(p)))] = norm > 0 ? std::sqrt(error / norm) : 0.0;
  }
  return errors;
}

// What weights that are quantised on loading are kept as, by name, in the order of Format.
py::dict quantized_types() {
  py::dict types;
  for (const FormatTraits& row : formats) {
    const WeightType& type = row.quantized;
    types[py::str(std::string(row.name))] = py::dict(
        "scale"_a = name_of(type.scale), "scale_rows"_a = type.scale_rows, "scale_cols"_a = type.scale_cols,
        "zero_points"_a = type.zero_points, "global_scale"_a = type.global_scale != GlobalScale::none);
  }
  return types;
}

ScaleType scale_from(std::string_view name) {
  const auto at = std::ranges::find(scale_names, name);
  KT_CHECK(at != scale_names.end(), "scale is \"{}\", wanted one of {}", name, joined(scale_names));
  return static_cast<ScaleType>(at - scale_names.begin());
}

index_t matrix_bytes(index_t rows, index_t cols, const std::string& format, const std::string& scale,
                     index_t scale_rows, index_t scale_cols, bool zero_points, bool global_scale) {
  KT_CHECK(rows >= 0 && cols >= 0 && scale_rows > 0 && scale_cols >= 0,
           "a matrix of {} x {} with scales for {} x {} is none", rows, cols, scale_rows, scale_cols);
  const WeightType type{format_from(format), scale_from(scale),
                        scale_rows,          scale_cols,
                        zero_points,         global_scale ? GlobalScale::multiplies : GlobalScale::none};
  return Weight{type, rows, cols}.bytes();
}

}  // namespace

}  // namespace kt

void bind_experts(py::module_& m) {
  using kt::Experts;
  m.def("quantized_types", &kt::quantized_types);
  m.def("matrix_bytes", &kt::matrix_bytes, py::arg("rows"), py::arg("cols"), py::arg("format"),
        py::arg("scale"), py::arg("scale_rows"), py::arg("scale_cols"), py::arg("zero_points"),
        py::arg("global_scale"));
  py::class_<Experts, std::shared_ptr<Experts>>(m, "Experts")
      .def_static("from_tensors", &kt::from_tensors, py::arg("gate"), py::arg("up"), py::arg("down"),
                  py::arg("gate_bias"), py::arg("up_bias"), py::arg("down_bias"), py::arg("activation"),
                  py::arg("format"), py::arg("runtime"), py::arg("placement"), py::arg("popularity"))
      .def_static("from_checkpoint", &kt::from_checkpoint, py::arg("checkpoint"), py::arg("layer"),
                  py::arg("activation"), py::arg("format"), py::arg("runtime"), py::arg("cache_dir"),
                  py::arg("paged"), py::arg("shared_dir"), py::arg("progress"), py::arg("placement"),
                  py::arg("popularity"), py::arg("experts") = py::none())
      .def_property_readonly("num_experts", [](const Experts& e) { return e.weights().num_experts; })
      .def_property_readonly("hidden_size", [](const Experts& e) { return e.weights().hidden; })
      .def_property_readonly("intermediate_size", [](const Experts& e) { return e.weights().intermediate; })
      .def_property_readonly("activation",
                             [](const Experts& e) { return kt::name_of(e.weights().activation); })
      .def_property_readonly("gated", [](const Experts& e) { return e.weights().gated; })
      .def_property_readonly("format",
                             [](const Experts& e) { return kt::name_of(e.weights().types.back().format); })
      .def_property_readonly("nbytes", [](const Experts& e) { return e.weights().bytes(); })
      .def_property_readonly("mapped", &Experts::mapped)
      .def_property_readonly("shared", &Experts::shared)
      .def("verify", &kt::verify)
      .def_property_readonly("quantization_error", &kt::quantization_error)
      .def_property_readonly("shards", [](const Experts& e) { return e.runtime().shards(); })
      .def_property_readonly("placement", [](const Experts& e) { return kt::name_of(e.weights().placement); })
      .def_property_readonly("refused", &Experts::refused)
      .def("homes", &Experts::homes, py::call_guard<kt::ReleaseGil>())
      .def("rebalance", &kt::rebalance, py::arg("popularity"))
      .def("routed", &kt::routed, py::arg("into"))
      .def("reset_routed", &Experts::reset_routed, py::call_guard<kt::ReleaseGil>())
      .def("page_nodes", &kt::page_nodes)
      .def("weights_at", &kt::weights_at)
      .def("bias", &kt::bias, py::arg("projection"), py::arg("into"))
      .def("dequantize", &kt::dequantize, py::arg("gate"), py::arg("up"), py::arg("down"));
}
