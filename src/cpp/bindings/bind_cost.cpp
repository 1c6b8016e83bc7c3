// The scaling model: shapes and rates in, bytes, FLOPs and seconds out.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "moe/cost.h"
#include "weights/cut.h"
#include "weights/homes.h"
#include "weights/quantize.h"

namespace py = pybind11;

namespace kt {

namespace {

LayerCall make_call(index_t tokens, index_t hidden, index_t intermediate, std::vector<index_t> routes,
                    std::array<index_t, 3> ranks, std::array<double, 3> weight_bytes, index_t lora_bytes,
                    bool backward, bool saved) {
  const auto check = [](const char* name, auto value, int least) {
    KT_CHECK(value >= least, "{} is {}, wanted at least {}", name, value, least);
  };
  check("tokens", tokens, 0);
  check("hidden", hidden, 1);
  check("intermediate", intermediate, 1);
  check("lora_bytes", lora_bytes, 0);
  for (const index_t count : routes) check("a number of routes", count, 0);
  for (const index_t rank : ranks) check("a rank", rank, 0);
  for (const double bytes : weight_bytes) check("weight_bytes", bytes, 0);
  return {tokens, hidden, intermediate, std::move(routes), ranks, weight_bytes, lora_bytes, backward, saved};
}

void check_cores(const std::vector<index_t>& cores) {
  KT_CHECK(!cores.empty(), "there are no shards, wanted one at least");
  for (const index_t n : cores) KT_CHECK(n >= 1, "a shard has {} cores, wanted at least 1", n);
}

Division make_division(const LayerCall& call, const std::vector<index_t>& cores, std::vector<int> homes,
                       index_t align) {
  check_cores(cores);
  KT_CHECK(align >= 1, "align is {}, wanted at least 1", align);
  return {split_by(call.intermediate, cores, align), std::move(homes)};
}

py::dict to_dict(const Traffic& traffic) {
  py::dict values;
  values["local"] = traffic.local;
  values["remote"] = traffic.remote;
  values["served"] = traffic.served;
  values["rows"] = traffic.rows;
  values["flops"] = traffic.flops;
  return values;
}

py::list to_list(const std::vector<Traffic>& shards) {
  py::list list;
  for (const Traffic& traffic : shards) list.append(to_dict(traffic));
  return list;
}

py::dict traffic(const LayerCall& call, const std::vector<index_t>& cores, const std::vector<int>& homes,
                 bool whole, index_t align) {
  const StageTraffic stages = layer_traffic(call, make_division(call, cores, homes, align), whole);
  py::dict by_name;
  for (std::size_t i = 0; i < stages.size(); ++i)
    if (std::ranges::any_of(stages[i], [](const Traffic& t) { return t.local + t.remote + t.flops > 0; }))
      by_name[py::str(std::string(stage_names[i]))] = to_list(stages[i]);
  return by_name;
}

using Node = std::array<double, 4>;  // local and remote bytes/s, FLOP/s, bytes of cache

std::vector<NodeRates> rates(const std::vector<index_t>& cores, const std::vector<Node>& nodes) {
  KT_CHECK(cores.size() == nodes.size(), "there are rates of {} nodes, wanted one for each of {} shards",
           nodes.size(), cores.size());
  std::vector<NodeRates> all;
  for (std::size_t i = 0; i < cores.size(); ++i)
    all.push_back({static_cast<double>(cores[i]), nodes[i][0], nodes[i][1], nodes[i][2], nodes[i][3]});
  return all;
}

py::dict time_of(const LayerCall& call, const std::vector<index_t>& cores, const std::vector<int>& homes,
                 const std::vector<Node>& nodes, bool whole, index_t align) {
  const Prediction prediction =
      predict(call, make_division(call, cores, homes, align), whole, rates(cores, nodes));
  py::dict values;
  values["seconds"] = prediction.seconds;
  values["limit"] = std::string(name_of(prediction.limit));
  values["overhead"] = prediction.overhead;
  values["node_seconds"] = prediction.node_time;
  values["traffic"] = to_list(prediction.traffic);
  return values;
}

bool sooner(const LayerCall& call, const std::vector<index_t>& cores, const std::vector<int>& homes,
            const std::vector<Node>& nodes, index_t align) {
  return whole_is_sooner(call, make_division(call, cores, homes, align), rates(cores, nodes));
}

// Of all experts in a format that weights are quantised to.
index_t align_of(const std::string& format, index_t intermediate) {
  const WeightType type = default_type(format_from(format));
  return cut_align({type, type, type}, intermediate);
}

std::vector<int> homes_of(int experts, const std::vector<index_t>& cores,
                          const std::vector<double>& popularity) {
  KT_CHECK(experts >= 0, "experts is {}, wanted at least 0", experts);
  check_cores(cores);
  return assign_homes(experts, cores, popularity);
}

}  // namespace

}  // namespace kt

void bind_cost(py::module_& m) {
  py::class_<kt::LayerCall>(m, "LayerCall")
      .def(py::init(&kt::make_call), py::kw_only(), py::arg("tokens"), py::arg("hidden"),
           py::arg("intermediate"), py::arg("routes"), py::arg("ranks"), py::arg("weight_bytes"),
           py::arg("lora_bytes"), py::arg("backward"), py::arg("saved"));
  m.def("layer_traffic", &kt::traffic, py::arg("call"), py::arg("cores"), py::arg("homes"), py::arg("whole"),
        py::arg("align") = 1);
  m.def("layer_time", &kt::time_of, py::arg("call"), py::arg("cores"), py::arg("homes"), py::arg("nodes"),
        py::arg("whole"), py::arg("align") = 1);
  m.def("whole_is_sooner", &kt::sooner, py::arg("call"), py::arg("cores"), py::arg("homes"), py::arg("nodes"),
        py::arg("align") = 1);
  m.def("cut_align", &kt::align_of, py::arg("format"), py::arg("intermediate"));
  m.def("assign_homes", &kt::homes_of, py::arg("experts"), py::arg("cores"), py::arg("popularity"));
}
