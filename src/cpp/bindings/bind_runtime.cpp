#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "bindings/gil.h"
#include "moe/runtime.h"

namespace py = pybind11;

namespace {

// Memory of one result, for torch.frombuffer; goes back when the last tensor in it is gone.
class ResultMemory {
 public:
  ResultMemory(const kt::Runtime& runtime, std::size_t bytes)
      : pool_(runtime.results()), buffer_(pool_->take(bytes)), bytes_(bytes) {}
  ~ResultMemory() { pool_->give_back(std::move(buffer_)); }
  ResultMemory(const ResultMemory&) = delete;
  ResultMemory& operator=(const ResultMemory&) = delete;

  py::buffer_info info() const {
    return {static_cast<unsigned char*>(buffer_.data()), static_cast<py::ssize_t>(bytes_)};
  }

 private:
  std::shared_ptr<kt::BufferPool> pool_;
  kt::Buffer buffer_;
  std::size_t bytes_;
};

}  // namespace

void bind_runtime(py::module_& m) {
  py::class_<kt::Runtime, std::shared_ptr<kt::Runtime>>(m, "Runtime")
      .def(py::init([](std::optional<int> threads, std::optional<int> shards, std::optional<std::string> isa,
                       const std::optional<std::vector<int>>& nodes) {
             return std::make_shared<kt::Runtime>(threads, shards, std::move(isa),
                                                  kt::usable_topology(nodes));
           }),
           py::arg("threads"), py::arg("shards"), py::arg("isa"), py::arg("nodes"))
      .def_property_readonly("threads", &kt::Runtime::threads)
      .def_property_readonly("shards", &kt::Runtime::shards)
      .def_property_readonly("isa", &kt::Runtime::isa)
      .def_property_readonly("nodes", &kt::Runtime::nodes)
      .def_property_readonly("scratch_bytes",
                             py::cpp_function(&kt::Runtime::scratch_bytes, py::call_guard<kt::ReleaseGil>()));
  py::class_<ResultMemory>(m, "ResultMemory", py::buffer_protocol())
      // With the GIL: os.fork waits for it, and so finds the pool unlocked.
      .def(py::init<const kt::Runtime&, std::size_t>(), py::arg("runtime"), py::arg("bytes"))
      .def_buffer(&ResultMemory::info);
}
