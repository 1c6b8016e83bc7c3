// What every binding needs of Python: the interpreter for other threads while the core computes, and a torch
// tensor as the core sees it, checked, then a pointer with a shape. Does not link torch.
//
// When the interpreter ends, CPython before 3.14 ends every daemon thread that takes the GIL, by
// pthread_exit: its stack is unwound, through frames that catch everything, allow no exception or touch
// Python objects, each of which ends the process. Here such a thread waits for the process to end instead.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/view.h"
#include "weights/json.h"

namespace kt {

// Calls f, which may take the GIL, so that it returns, throws or never comes back. Between this frame and the
// interpreter's there must be nothing to destroy: f calls the C API alone.
template <class F>
auto stay(const F& f) {
  try {
    return f();
  } catch (abi::__forced_unwind&) {
    for (;;) pause();
  }
}

class ReleaseGil {
 public:
  ReleaseGil() : thread_(PyEval_SaveThread()) {}
  ~ReleaseGil() {
    stay([this] { PyEval_RestoreThread(thread_); });
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* thread_;
};

// Calls the C API with the GIL, from a thread that has released it: f returns a new reference, or null, which
// is thrown as an exception.
template <class F>
void with_gil(const F& f) {
  const PyGILState_STATE state = stay([] { return PyGILState_Ensure(); });
  PyObject* const result = stay(f);
  if (result == nullptr) {
    const pybind11::error_already_set error;
    PyGILState_Release(state);
    throw error;
  }
  Py_DECREF(result);
  PyGILState_Release(state);
}

struct Tensor {
  void* data;
  DType dtype;
  std::vector<index_t> shape;

  index_t dim(std::size_t i) const { return shape[i]; }
  std::size_t bytes() const;
  MatView matrix() const { return view(data, dtype, shape[0], shape[1]); }
};

// Reads the tensor's address, dtype and shape. TypeError when it is no tensor; ValueError, naming it `name`,
// when it is not on the CPU, not contiguous, without data (a FakeTensor), or of a dtype or number of
// dimensions that was not asked for.
Tensor read_tensor(pybind11::handle object, const std::string& name, std::initializer_list<DType> dtypes,
                   std::size_t dims);

// ValueError unless the shape is the one wanted; `meaning` says what the dimensions are, as "[E, r, H]".
void check_shape(const Tensor& tensor, const std::string& name, std::initializer_list<index_t> wanted,
                 std::string_view meaning);

}  // namespace kt
