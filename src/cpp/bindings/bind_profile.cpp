// What takes time: the profile of a runtime, and what the machine can do at most.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <filesystem>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>

#include "base/error.h"
#include "bindings/gil.h"
#include "moe/ceilings.h"
#include "moe/profile.h"
#include "moe/runtime.h"

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
    time_.emplace(*profile_);
  }

  bool stopped() const { return time_.has_value(); }

  void write(const std::filesystem::path& path) const { kt::write_trace(*profile_, time(), path.native()); }

  py::list calls() const {
    py::list all;
    for (const kt::CallRecord& call : profile_->calls()) {
      const auto wall = static_cast<double>((call.end - call.begin) * profile_->threads());
      all.append(py::make_tuple(name(call.direction), seconds(time()(call.begin)), seconds(time()(call.end)),
                                static_cast<double>(call.covered) / wall, call.tokens, call.routes,
                                call.experts, call.most_rows, call.work.flops, call.work.local,
                                call.work.remote));
    }
    return all;
  }

  py::list spans() const {
    py::list all;
    for (int thread = 0; thread < profile_->threads(); ++thread)
      for (const kt::SpanRecord& span : kt::in_order(profile_->recorder(static_cast<std::size_t>(thread))))
        all.append(py::make_tuple(name(span.stage), thread, span.about.shard, seconds(time()(span.begin)),
                                  seconds(time()(span.end)), seconds(time().lasted(span.own)), span.call,
                                  span.about.expert, span.about.rows, span.work.flops, span.work.local,
                                  span.work.remote));
    return all;
  }

  // By stage, a tuple for each thread.
  py::dict totals() const {
    py::dict all;
    for (std::size_t i = 0; i < kt::kStages; ++i) {
      const auto stage = static_cast<kt::Stage>(i);
      py::list threads;
      for (int thread = 0; thread < profile_->threads(); ++thread) {
        const kt::StageTotal& total = profile_->recorder(static_cast<std::size_t>(thread)).total(stage);
        threads.append(py::make_tuple(total.spans, seconds(time().lasted(total.own)), total.work.flops,
                                      total.work.local, total.work.remote));
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
      all[name(direction)] = py::make_tuple(total.calls, seconds(time().lasted(total.wall)),
                                            seconds(time().lasted(total.covered)));
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
  const kt::TraceTime& time() const {
    if (!time_) throw std::runtime_error("the profile is recording");
    return *time_;
  }
  static double seconds(std::int64_t ns) { return 1e-9 * static_cast<double>(ns); }

  std::shared_ptr<kt::Runtime> runtime_;
  std::shared_ptr<kt::Profile> profile_;
  std::optional<kt::TraceTime> time_;
};

}  // namespace

void bind_profile(py::module_& m) {
  m.def("measure_ceilings", &measure_ceilings, py::arg("runtime"), py::arg("seconds"), py::arg("read_bytes"));
  // A call that runs is waited for, and it may want the GIL.
  using Released = py::call_guard<kt::ReleaseGil>;
  py::class_<Recording>(m, "Profile")
      .def(py::init<std::shared_ptr<kt::Runtime>, std::size_t>(), py::arg("runtime"), py::arg("most_spans"),
           Released())
      .def("stop", &Recording::stop, Released())
      .def_property_readonly("stopped", &Recording::stopped)
      .def("write", &Recording::write, py::arg("path"), Released())
      .def("calls", &Recording::calls)
      .def("spans", &Recording::spans)
      .def("totals", &Recording::totals)
      .def("directions", &Recording::directions)
      .def_property_readonly("dropped", &Recording::dropped)
      .def_property_readonly("dropped_calls", &Recording::dropped_calls);
}
