// The interpreter for other threads while the core computes.
#pragma once

#include <pybind11/pybind11.h>
#include <unistd.h>

namespace kt {

// As pybind11's gil_scoped_release, but for daemon threads: when the interpreter ends meanwhile, it would end
// the thread by unwinding it through frames that allow none. The thread waits for the process to end instead.
class ReleaseGil {
 public:
  ReleaseGil() : thread_(PyEval_SaveThread()) {}
  ~ReleaseGil() noexcept(false) {
#if PY_VERSION_HEX >= 0x030d0000
    const bool ending = Py_IsFinalizing() != 0;
#else
    const bool ending = _Py_IsFinalizing() != 0;
#endif
    while (ending) pause();
    PyEval_RestoreThread(thread_);
  }
  ReleaseGil(const ReleaseGil&) = delete;
  ReleaseGil& operator=(const ReleaseGil&) = delete;

 private:
  PyThreadState* thread_;
};

}  // namespace kt
