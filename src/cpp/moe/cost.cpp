#include "moe/cost.h"

#include <algorithm>
#include <cmath>

#include "base/error.h"
#include "moe/block.h"

namespace kt {

namespace {

constexpr double kTaskSeconds = 1e-6;     // to take a task
constexpr double kWaitSeconds = 2e-6;     // until threads of one node see that a step is done
constexpr double kFarWaitSeconds = 5e-6;  // and those of other nodes

// Tasks of all shards, about: a few for each block, and those of the products.
double tasks(const LayerCall& call) {
  double blocks = 0;
  for (const index_t count : call.routes) blocks += static_cast<double>(ceil_div(count, kBlockRows));
  const auto weights = static_cast<double>(3 * 2 * call.hidden * call.intermediate);  // bf16
  return blocks * (3 + std::ceil(weights / kMostCacheBytes)) * (call.backward && !call.saved ? 2 : 1);
}

// Bytes that a shard's rows take at a time.
double rows_kept(const LayerCall& call, const Division& division, bool whole, std::size_t shard) {
  index_t routes = 0;
  for (std::size_t e = 0; e < call.routes.size(); ++e)
    if (!whole || division.homes[e] == static_cast<int>(shard)) routes += call.routes[e];
  return static_cast<double>(routes * kSumCols * kSumsKept) * sizeof(float);
}

double overhead(const LayerCall& call, const Division& division, bool whole,
                const std::vector<NodeRates>& nodes) {
  double cores = 0;
  for (const NodeRates& node : nodes) cores += node.cores;
  int near = call.backward ? 5 : 4, far = 1;  // steps that wait for one before
  if (call.backward && !call.saved) near += 2;
  if (!whole) far += call.backward ? 3 : 2;  // P or Q from home, its parts, the parts of the sum
  if (division.shards.size() == 1) near += 1, far = 0;
  return tasks(call) * kTaskSeconds / cores + near * kWaitSeconds + far * kFarWaitSeconds;
}

}  // namespace

std::string_view name_of(Limit limit) {
  constexpr std::array<std::string_view, 4> names{"compute", "memory", "remote", "overhead"};
  return names[static_cast<std::size_t>(limit)];
}

Prediction predict(const LayerCall& call, const Division& division, bool whole,
                   const std::vector<NodeRates>& nodes) {
  KT_CHECK(nodes.size() == division.shards.size(), "there are {} nodes, wanted one for each of {} shards",
           nodes.size(), division.shards.size());
  for (const NodeRates& node : nodes)
    KT_CHECK(node.cores > 0 && node.local > 0 && node.remote > 0 && node.flops > 0,
             "a node has {} cores, {} local and {} remote bytes/s and {} FLOP/s, wanted more than 0",
             node.cores, node.local, node.remote, node.flops);
  Prediction result;
  result.traffic.resize(nodes.size());
  for (const std::vector<Traffic>& stage : layer_traffic(call, division, whole))
    for (std::size_t s = 0; s < nodes.size(); ++s) result.traffic[s] += stage[s];
  result.overhead = overhead(call, division, whole, nodes);
  double slowest = 0;
  for (std::size_t s = 0; s < nodes.size(); ++s) {
    const Traffic& t = result.traffic[s];
    const bool cached = rows_kept(call, division, whole, s) <= nodes[s].cache;
    const double local = t.local + t.served - (cached ? t.rows : 0);
    const std::array times{t.flops / nodes[s].flops, local / nodes[s].local, t.remote / nodes[s].remote};
    const auto longest = std::ranges::max_element(times);
    result.node_time.push_back(*longest);
    if (*longest < slowest) continue;
    slowest = *longest;
    result.limit = static_cast<Limit>(longest - times.begin());
  }
  if (result.overhead > slowest) result.limit = Limit::overhead;
  result.seconds = slowest + result.overhead;
  return result;
}

bool whole_is_sooner(const LayerCall& call, const Division& division, const std::vector<NodeRates>& nodes) {
  return predict(call, division, true, nodes).seconds < predict(call, division, false, nodes).seconds;
}

}  // namespace kt
