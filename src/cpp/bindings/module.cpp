#include <pybind11/pybind11.h>

#include <new>

#include "base/error.h"

namespace py = pybind11;

void bind_runtime(py::module_& m);
void bind_checkpoint(py::module_& m);
void bind_experts(py::module_& m);
void bind_layer(py::module_& m);

PYBIND11_MODULE(_core, m) {
  m.attr("__version__") = KT_MOE_VERSION;
  py::register_exception_translator([](std::exception_ptr error) {
    try {
      if (error) std::rethrow_exception(error);
    } catch (const kt::NotFoundError& e) {
      PyErr_SetString(PyExc_FileNotFoundError, e.what());
    } catch (const kt::IoError& e) {
      PyErr_SetString(PyExc_OSError, e.what());
    } catch (const kt::ValueError& e) {
      PyErr_SetString(PyExc_ValueError, e.what());
    } catch (const std::bad_alloc&) {
      PyErr_SetString(PyExc_MemoryError, "kt_moe: the memory could not be allocated");
    }
  });
  bind_runtime(m);
  bind_checkpoint(m);
  bind_experts(m);
  bind_layer(m);
}
