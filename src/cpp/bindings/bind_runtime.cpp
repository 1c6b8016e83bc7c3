// The machine, and where layers run on it.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <utility>

#include "bindings/gil.h"
#include "cpu/layout.h"
#include "cpu/processor.h"
#include "cpu/topology.h"
#include "kernels/registry.h"
#include "moe/runtime.h"

namespace py = pybind11;

namespace {

py::dict node_dict(const kt::NumaNode& node) {
  py::dict d;
  d["id"] = node.id;
  d["cpus"] = node.cpus;
  d["cores"] = node.cores;
  d["memory_bytes"] = node.memory_bytes;
  d["free_bytes"] = node.free_bytes;
  d["cache_bytes"] = node.cache_bytes;
  d["memory_allowed"] = node.memory_allowed;
  d["distances"] = node.distances;
  return d;
}

py::object limit(auto value) { return value > 0 ? py::cast(value) : py::none(); }

py::dict topology_dict(const kt::Topology& topology) {
  py::dict caches, info;
  py::list nodes;
  caches["l1d"] = topology.l1d;
  caches["l2"] = topology.l2;
  caches["l3"] = topology.l3;
  for (const kt::NumaNode& node : topology.nodes) nodes.append(node_dict(node));
  info["model"] = topology.model;
  info["cpus"] = topology.cpus;
  info["cores"] = topology.cores;
  info["threads_per_core"] = topology.threads_per_core;
  info["packages"] = topology.packages;
  info["online_cpus"] = topology.online.size();
  info["caches"] = caches;
  info["l2_domains"] = topology.l2_domains.size();
  info["l3_domains"] = topology.l3_domains.size();
  info["cgroup_cpu_limit"] = limit(topology.cgroup_cpus);
  info["cgroup_memory_limit"] = limit(topology.cgroup_memory);
  info["numa_nodes"] = topology.nodes.size();
  info["nodes"] = nodes;
  return info;
}

py::dict read_topology(const std::string& root, const std::optional<std::vector<int>>& cpus) {
  const kt::Topology topology = kt::read_topology(root, cpus);
  py::dict info = topology_dict(topology);
  info["online"] = topology.online;
  info["l2_sharing"] = topology.l2_domains;
  info["l3_sharing"] = topology.l3_domains;
  return info;
}

py::dict cpu_info() {
  const unsigned features = kt::cpu_features();
  py::dict sets, info = topology_dict(kt::read_topology());
  for (const kt::KernelEntry& entry : kt::kernel_registry())
    sets[py::str(entry.name)] = kt::availability(entry, features);
  info["isa_features"] = kt::feature_names(features);
  info["kernel_sets"] = sets;
  info["selected"] = kt::Runtime(1, std::nullopt, std::nullopt).isa();
  return info;
}

py::dict kernel_flags() {
  py::dict flags;
  for (const kt::KernelEntry& entry : kt::kernel_registry())
    flags[py::str(entry.name)] = kt::cpuinfo_flags(entry.needs);
  return flags;
}

py::list probe_nodes() {
  std::vector<kt::NodeProbe> probes;
  {
    const kt::ReleaseGil release;
    probes = kt::probe_nodes(kt::read_topology());
  }
  py::list list;
  for (const kt::NodeProbe& probe : probes) {
    py::dict d;
    d["node"] = probe.node;
    d["asked"] = probe.asked;
    d["bound"] = probe.bound;
    d["pages"] = probe.pages;
    d["right"] = probe.right;
    d["unknown"] = probe.unknown;
    list.append(d);
  }
  return list;
}

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
  m.def("cpu_info", &cpu_info);
  m.def("kernel_flags", &kernel_flags);
  m.def("read_topology", &read_topology, py::arg("root"), py::arg("cpus") = std::nullopt);
  m.def("probe_nodes", &probe_nodes);
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
