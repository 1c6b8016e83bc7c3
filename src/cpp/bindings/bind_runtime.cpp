// The machine, where layers run on it, and what takes time: a runtime's profile, and what the machine can do
// at most.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cmath>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "base/error.h"
#include "bindings/python.h"
#include "cpu/layout.h"
#include "cpu/processor.h"
#include "cpu/topology.h"
#include "kernels/registry.h"
#include "moe/ceilings.h"
#include "moe/profile.h"
#include "moe/runtime.h"

namespace py = pybind11;
using namespace py::literals;

namespace {

py::dict node_dict(const kt::NumaNode& node) {
  return py::dict("id"_a = node.id, "cpus"_a = node.cpus, "cores"_a = node.cores,
                  "memory_bytes"_a = node.memory_bytes, "free_bytes"_a = node.free_bytes,
                  "cache_bytes"_a = node.cache_bytes, "memory_allowed"_a = node.memory_allowed,
                  "distances"_a = node.distances);
}

py::object limit(auto value) { return value > 0 ? py::cast(value) : py::none(); }

py::dict topology_dict(const kt::Topology& topology) {
  py::list nodes;
  for (const kt::NumaNode& node : topology.nodes) nodes.append(node_dict(node));
  return py::dict("model"_a = topology.model, "cpus"_a = topology.cpus, "cores"_a = topology.cores,
                  "threads_per_core"_a = topology.threads_per_core, "packages"_a = topology.packages,
                  "online_cpus"_a = topology.online.size(),
                  "caches"_a = py::dict("l1d"_a = topology.l1d, "l2"_a = topology.l2, "l3"_a = topology.l3),
                  "l2_domains"_a = topology.l2_domains.size(), "l3_domains"_a = topology.l3_domains.size(),
                  "cgroup_cpu_limit"_a = limit(topology.cgroup_cpus),
                  "cgroup_memory_limit"_a = limit(topology.cgroup_memory),
                  "numa_nodes"_a = topology.nodes.size(), "nodes"_a = nodes);
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
  for (const kt::NodeProbe& probe : probes)
    list.append(py::dict("node"_a = probe.node, "asked"_a = probe.asked, "bound"_a = probe.bound,
                         "pages"_a = probe.pages, "right"_a = probe.right, "unknown"_a = probe.unknown));
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

py::dict measure_ceilings(const std::shared_ptr<kt::Runtime>& runtime, double seconds,
                          std::size_t read_bytes) {
  KT_CHECK(seconds > 0, "seconds is {}, wanted more than 0", seconds);
  kt::Ceilings ceilings;
  {
    const kt::ReleaseGil release;
    ceilings = kt::measure_ceilings(*runtime, seconds, read_bytes);
  }
  return py::dict("registers_one"_a = ceilings.registers_one, "registers_all"_a = ceilings.registers_all,
                  "l1_one"_a = ceilings.l1_one, "l1_all"_a = ceilings.l1_all, "l2_one"_a = ceilings.l2_one,
                  "l2_all"_a = ceilings.l2_all, "read_one"_a = ceilings.read_one,
                  "read_all"_a = ceilings.read_all);
}

// A runtime's profile, from construction to `stop`; what it holds may be read after that.
class Recording {
 public:
  Recording(std::shared_ptr<kt::Runtime> runtime, std::size_t most_spans)
      : runtime_(std::move(runtime)),
        profile_(std::make_shared<kt::Profile>(runtime_->first_shards(), runtime_->shards(), most_spans)) {
    runtime_->set_profile(profile_);
  }

  void stop() {
    runtime_->set_profile(nullptr);
    ns_per_tick_ = 1e9 * profile_->clock().seconds_per_tick();
  }

  bool stopped() const { return ns_per_tick_.has_value(); }

  py::list calls() const {
    py::list all;
    for (const kt::CallRecord& call : profile_->calls()) {
      const auto wall = static_cast<double>((call.end - call.begin) * profile_->threads());
      all.append(py::make_tuple(name(call.direction), seconds_at(call.begin), seconds_at(call.end),
                                static_cast<double>(call.covered) / wall, call.tokens, call.routes,
                                call.experts, call.most_rows, call.work.flops, call.work.local,
                                call.work.remote));
    }
    return all;
  }

  py::list spans() const {
    py::list all;
    for (int thread = 0; thread < profile_->threads(); ++thread)
      for (const kt::SpanRecord& span : kt::in_order(profile_->recorder(kt::to_size(thread))))
        all.append(py::make_tuple(name(span.stage), thread, span.args.shard, seconds_at(span.begin),
                                  seconds_at(span.end), seconds(span.own), span.call, span.args.expert,
                                  span.args.rows, span.work.flops, span.work.local, span.work.remote));
    return all;
  }

  // By stage, a tuple for each thread.
  py::dict totals() const {
    py::dict all;
    for (std::size_t i = 0; i < kt::kStages; ++i) {
      const auto stage = static_cast<kt::Stage>(i);
      py::list threads;
      for (int thread = 0; thread < profile_->threads(); ++thread) {
        const kt::StageTotal& total = profile_->recorder(kt::to_size(thread)).total(stage);
        threads.append(py::make_tuple(total.spans, seconds(total.own), total.work.flops, total.work.local,
                                      total.work.remote));
      }
      all[name(stage)] = threads;
    }
    return all;
  }

  // By direction: calls, seconds, and seconds of all threads that spans cover.
  py::dict directions() const {
    py::dict all;
    for (const auto direction : {kt::Direction::forward, kt::Direction::backward}) {
      const kt::CallTotal& total = profile_->total(direction);
      all[name(direction)] = py::make_tuple(total.calls, seconds(total.wall), seconds(total.covered));
    }
    return all;
  }

  std::int64_t dropped() const { return profile_->dropped_spans(); }
  std::int64_t dropped_calls() const { return profile_->dropped_calls(); }

 private:
  template <class T>
  static py::str name(T of) {
    return py::str(std::string(kt::name_of(of)));
  }
  // In whole nanoseconds; and since the profile began.
  double seconds(kt::Ticks ticks) const {
    if (!ns_per_tick_) throw std::runtime_error("the profile is recording");
    return 1e-9 * std::floor(static_cast<double>(ticks) * *ns_per_tick_ + 0.5);
  }
  double seconds_at(kt::Ticks ticks) const { return seconds(ticks - profile_->clock().begin()); }

  std::shared_ptr<kt::Runtime> runtime_;
  std::shared_ptr<kt::Profile> profile_;
  std::optional<double> ns_per_tick_;  // none: it is recording
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
  m.def("measure_ceilings", &measure_ceilings, py::arg("runtime"), py::arg("seconds"), py::arg("read_bytes"));
  // A call that runs is waited for, and it may want the GIL.
  using Released = py::call_guard<kt::ReleaseGil>;
  py::class_<Recording>(m, "Profile")
      .def(py::init<std::shared_ptr<kt::Runtime>, std::size_t>(), py::arg("runtime"), py::arg("most_spans"),
           Released())
      .def("stop", &Recording::stop, Released())
      .def_property_readonly("stopped", &Recording::stopped)
      .def("calls", &Recording::calls)
      .def("spans", &Recording::spans)
      .def("totals", &Recording::totals)
      .def("directions", &Recording::directions)
      .def_property_readonly("dropped", &Recording::dropped)
      .def_property_readonly("dropped_calls", &Recording::dropped_calls);
}
