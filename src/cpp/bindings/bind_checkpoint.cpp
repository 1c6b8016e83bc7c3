// _core.Checkpoint is the ExpertIndex: it reaches the checkpoint, the checkpoint does not reach it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <array>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/python.h"
#include "weights/checkpoint.h"
#include "weights/expert_index.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

std::shared_ptr<kt::ExpertIndex> open_checkpoint(const std::filesystem::path& path) {
  const kt::ReleaseGil release;  // it reads every header
  return std::make_shared<kt::ExpertIndex>(std::make_shared<const kt::Checkpoint>(path));
}

std::vector<std::filesystem::path> files(const kt::ExpertIndex& index) {
  std::vector<std::filesystem::path> paths;
  for (const auto& file : index.checkpoint().files()) paths.push_back(file.path());
  return paths;
}

py::dict tensors(const kt::ExpertIndex& index) {
  std::map<const kt::DataFile*, py::object> paths;  // a Path costs more than the rest of an entry
  for (const auto& file : index.checkpoint().files()) paths.emplace(&file, py::cast(file.path()));
  py::dict out;
  for (const auto& [name, tensor, file] : index.checkpoint().tensors()) {
    out[py::str(name)] =
        py::make_tuple(tensor.type->name, py::tuple(py::cast(tensor.shape)), tensor.nbytes, paths.at(file));
  }
  return out;
}

py::dict layer(const kt::ExpertIndex& index, int number) {
  const auto info = index.layer(number);
  const kt::WeightType& gate = info.types[kt::index_of(kt::projections_of(info.gated).front())];
  py::dict memory;
  for (const kt::Projection p : kt::projections_of(info.gated))
    memory[py::str(std::string(kt::name_of(p)))] = info.num_experts * info.matrix(p).bytes();
  return py::dict("num_experts"_a = info.num_experts, "hidden_size"_a = info.hidden,
                  "intermediate_size"_a = info.intermediate, "dtype"_a = info.stored_type,
                  "layout"_a = info.layout, "nbytes"_a = info.nbytes, "gated"_a = info.gated,
                  "biases"_a = info.biases, "mappable"_a = info.mappable,
                  "format"_a = kt::name_of(gate.format), "scale_type"_a = kt::name_of(gate.scale),
                  "scale_rows"_a = gate.scale_rows, "scale_cols"_a = gate.scale_cols,
                  "zero_points"_a = gate.zero_points,
                  "global_scale"_a = gate.global_scale != kt::GlobalScale::none, "memory_bytes"_a = memory);
}

// The fields of `kt_moe.checkpoint.ExpertList`.
using Fields = std::tuple<std::string, bool, std::array<std::string, 3>, int, int, std::optional<bool>>;

std::shared_ptr<kt::ExpertIndex> with_lists(const kt::ExpertIndex& index,
                                            const std::map<int, Fields>& numbered) {
  std::map<int, kt::ExpertList> lists;
  for (const auto& [number, fields] : numbered) {
    const auto& [prefix, fused, words, first, experts, interleaved] = fields;
    lists[number] = {prefix,     fused ? kt::Form::fused : kt::Form::per_expert, words, first, experts,
                     interleaved};
  }
  const kt::ReleaseGil release;
  return std::make_shared<kt::ExpertIndex>(index, lists);
}

}  // namespace

void bind_checkpoint(py::module_& m) {
  py::class_<kt::ExpertIndex, std::shared_ptr<kt::ExpertIndex>>(m, "Checkpoint")
      .def(py::init(&open_checkpoint), py::arg("path"))
      .def_property_readonly("path", [](const kt::ExpertIndex& index) { return index.checkpoint().path(); })
      .def_property_readonly("files", &files)
      .def("tensors", &tensors)
      .def_property_readonly("layers", &kt::ExpertIndex::layers)
      .def("layer", &layer, py::arg("layer"))
      .def("with_lists", &with_lists, py::arg("lists"));
}
