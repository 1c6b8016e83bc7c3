#include <pybind11/pybind11.h>

#include <cstring>
#include <memory>

#include "base/error.h"
#include "bindings/tensor.h"
#include "weights/experts.h"

namespace py = pybind11;

namespace kt {

namespace {

constexpr auto kFloats = {DType::bf16, DType::f16, DType::f32};

std::shared_ptr<Experts> from_tensors(py::handle gate, py::handle up, py::handle down,
                                      const std::string& activation, std::shared_ptr<Runtime> runtime) {
  const std::array tensors{read_tensor(gate, "gate", kFloats, 3), read_tensor(up, "up", kFloats, 3),
                           read_tensor(down, "down", kFloats, 3)};
  const index_t e = tensors[0].dim(0), i = tensors[0].dim(1), h = tensors[0].dim(2);
  KT_CHECK(e > 0 && i > 0 && h > 0, "gate has shape {}, wanted [E, I, H] with no dimension 0",
           shape_text(tensors[0].shape));
  check_shape(tensors[1], "up", {e, i, h}, "[E, I, H] of gate");
  check_shape(tensors[2], "down", {e, h, i}, "[E, H, I] of gate's [E, I, H]");
  const Activation act = activation_from(activation);

  const py::gil_scoped_release release;
  return std::make_shared<Experts>(std::move(runtime), static_cast<int>(e), h, i, act,
                                   [&](int expert, Projection p) {
                                     const Tensor& t = tensors[index_of(p)];
                                     return Stack{t.data, t.dtype, t.dim(1), t.dim(2)}[expert];
                                   });
}

std::shared_ptr<Experts> from_checkpoint(const std::shared_ptr<ExpertIndex>& index, int layer,
                                         const std::string& activation, std::shared_ptr<Runtime> runtime) {
  const Activation act = activation_from(activation);
  const py::gil_scoped_release release;
  return Experts::from_index(std::move(runtime), *index, layer, act);
}

void dequantize(const Experts& experts, py::handle gate, py::handle up, py::handle down) {
  const ExpertWeights& w = experts.weights();
  const std::array targets{gate, up, down};
  for (const Projection p : projections) {
    const Stack& stack = w.of(p);
    const std::string name(name_of(p));
    const Tensor target = read_tensor(targets[index_of(p)], name, {DType::bf16}, 3);
    check_shape(target, name, {w.num_experts, stack.rows, stack.cols}, "[E, rows, cols]");
    std::memcpy(target.data, stack.data, static_cast<std::size_t>(w.num_experts * stack.bytes()));
  }
}

}  // namespace

}  // namespace kt

void bind_experts(py::module_& m) {
  using kt::Experts;
  py::class_<Experts, std::shared_ptr<Experts>>(m, "Experts")
      .def_static("from_tensors", &kt::from_tensors, py::arg("gate"), py::arg("up"), py::arg("down"),
                  py::arg("activation"), py::arg("runtime"))
      .def_static("from_checkpoint", &kt::from_checkpoint, py::arg("checkpoint"), py::arg("layer"),
                  py::arg("activation"), py::arg("runtime"))
      .def_property_readonly("num_experts", [](const Experts& e) { return e.weights().num_experts; })
      .def_property_readonly("hidden_size", [](const Experts& e) { return e.weights().hidden; })
      .def_property_readonly("intermediate_size", [](const Experts& e) { return e.weights().intermediate; })
      .def_property_readonly("activation",
                             [](const Experts& e) { return kt::name_of(e.weights().activation); })
      .def_property_readonly("format", [](const Experts&) { return "bf16"; })
      .def_property_readonly("nbytes", &Experts::nbytes)
      .def_property_readonly("shards", [](const Experts& e) { return e.runtime().shards(); })
      .def("dequantize", &kt::dequantize, py::arg("gate"), py::arg("up"), py::arg("down"));
}
