#include "bindings/python.h"

#include <pybind11/gil_safe_call_once.h>

#include <algorithm>
#include <array>

#include "base/error.h"

namespace py = pybind11;

namespace kt {

namespace {

struct TorchType {
  DType dtype;
  py::object torch;
};

// The dtypes we read, as torch's own objects. Never destroyed: an interpreter that is shutting down must not
// touch them.
const std::vector<TorchType>& torch_types() {
  PYBIND11_CONSTINIT static py::gil_safe_call_once_and_store<std::vector<TorchType>> storage;
  return storage
      .call_once_and_store_result([] {
        const py::module_ torch = py::module_::import("torch");
        std::vector<TorchType> types;
        for (const DType dtype : {DType::bf16, DType::f16, DType::f32, DType::i32, DType::i64})
          types.push_back({dtype, torch.attr(std::string(name_of(dtype)).c_str())});
        return types;
      })
      .get_stored();
}

std::optional<DType> dtype_of(py::handle tensor) {
  const py::object type = tensor.attr("dtype");
  for (const TorchType& known : torch_types())
    if (type.is(known.torch)) return known.dtype;
  return std::nullopt;
}

}  // namespace

std::size_t Tensor::bytes() const {
  std::size_t total = size_of(dtype);
  for (const index_t n : shape) total *= to_size(n);
  return total;
}

Tensor read_tensor(py::handle object, const std::string& name, std::initializer_list<DType> dtypes,
                   std::size_t dims) {
  if (!py::hasattr(object, "data_ptr"))
    throw py::type_error(message("{} is a {}, wanted a torch.Tensor", name, Py_TYPE(object.ptr())->tp_name));
  KT_CHECK(object.attr("is_cpu").cast<bool>(), "{} is on {}, wanted the CPU", name,
           std::string(py::str(object.attr("device").attr("type"))));
  const std::optional<DType> dtype = dtype_of(object);
  KT_CHECK(dtype && std::find(dtypes.begin(), dtypes.end(), *dtype) != dtypes.end(), "{} is {}, wanted {}",
           name, std::string(py::str(object.attr("dtype"))),
           joined(dtypes, [](DType wanted) { return name_of(wanted); }, " or "));

  Tensor tensor{nullptr, *dtype, {}};
  for (const py::handle n : py::tuple(object.attr("shape"))) tensor.shape.push_back(n.cast<index_t>());
  KT_CHECK(tensor.shape.size() == dims, "{} has shape {}, wanted {} dimensions", name,
           shape_text(tensor.shape), dims);
  KT_CHECK(object.attr("is_contiguous")().cast<bool>(), "{} is not contiguous", name);
  tensor.data = reinterpret_cast<void*>(object.attr("data_ptr")().cast<std::uintptr_t>());
  const bool empty = std::find(tensor.shape.begin(), tensor.shape.end(), 0) != tensor.shape.end();
  KT_CHECK(tensor.data != nullptr || empty, "{} is a {} without data of its own, wanted a plain tensor", name,
           Py_TYPE(object.ptr())->tp_name);
  return tensor;
}

void check_shape(const Tensor& tensor, const std::string& name, std::initializer_list<index_t> wanted,
                 std::string_view meaning) {
  KT_CHECK(std::equal(tensor.shape.begin(), tensor.shape.end(), wanted.begin(), wanted.end()),
           "{} has shape {}, wanted {} = {}", name, shape_text(tensor.shape), meaning,
           shape_text({wanted.begin(), wanted.size()}));
}

}  // namespace kt
