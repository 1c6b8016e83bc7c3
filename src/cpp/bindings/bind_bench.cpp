#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "base/error.h"
#include "bindings/gil.h"
#include "moe/ceilings.h"

namespace py = pybind11;

namespace {

py::dict measure_ceilings(const std::shared_ptr<kt::Runtime>& runtime, double seconds,
                          std::size_t read_bytes) {
  KT_CHECK(seconds > 0, "seconds is {}, wanted more than 0", seconds);
  kt::Ceilings ceilings;
  {
    const kt::ReleaseGil release;
    ceilings = kt::measure_ceilings(*runtime, seconds, read_bytes);
  }
  py::dict lists;
  lists["registers_one"] = ceilings.registers_one;
  lists["registers_all"] = ceilings.registers_all;
  lists["l1_one"] = ceilings.l1_one;
  lists["l1_all"] = ceilings.l1_all;
  lists["l2_one"] = ceilings.l2_one;
  lists["l2_all"] = ceilings.l2_all;
  lists["read_one"] = ceilings.read_one;
  lists["read_all"] = ceilings.read_all;
  return lists;
}

}  // namespace

void bind_bench(py::module_& m) {
  m.def("measure_ceilings", &measure_ceilings, py::arg("runtime"), py::arg("seconds"), py::arg("read_bytes"));
}
