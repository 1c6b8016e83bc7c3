// The interpreter for other threads while the core computes.
//
// When the interpreter ends, CPython before 3.14 ends every daemon thread that takes the GIL, by
// pthread_exit: its stack is unwound, through frames that catch everything, allow no exception or touch
// Python objects, each of which ends the process. Here such a thread waits for the process to end instead.
#pragma once

#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <unistd.h>

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

}  // namespace kt
