#include "cpu/layout.h"

#include <algorithm>
#include <string>
#include <utility>

#include "base/error.h"

namespace kt {

namespace {

// A common multiple of small numbers, so that shares of a node are whole.
constexpr index_t kShares = 720720;

index_t cores_of(const NumaNode& node) { return std::max<index_t>(1, std::ssize(node.cores)); }

// The node itself, or the nearest one with memory for this process.
int memory_of(const Topology& topology, const NumaNode& node) {
  const NumaNode* best = &node;
  int distance = 0;
  for (std::size_t i = 0; !node.has_memory() && i < topology.nodes.size(); ++i) {
    const NumaNode& other = topology.nodes[i];
    const int d = i < node.distances.size() ? node.distances[i] : 255;
    if (other.has_memory() && (best == &node || d < distance)) best = &other, distance = d;
  }
  return best->id;
}

// n things among parts, at least one each, the rest by weight; n >= the number of parts.
std::vector<Range> share_out(index_t n, const std::vector<index_t>& weights) {
  std::vector<Range> parts = split_by(n - std::ssize(weights), weights, 1);
  for (std::size_t i = 0; i < parts.size(); ++i) {
    parts[i].begin += static_cast<index_t>(i);
    parts[i].end += static_cast<index_t>(i) + 1;
  }
  return parts;
}

using Nodes = std::span<const NumaNode* const>;

Nodes part_of(Nodes nodes, Range range) {
  return nodes.subspan(static_cast<std::size_t>(range.begin), static_cast<std::size_t>(range.size()));
}

index_t cores_of(Nodes nodes) {
  index_t cores = 0;
  for (const NumaNode* node : nodes) cores += cores_of(*node);
  return cores;
}

// Those with CPUs; or where these are not known, any.
std::vector<const NumaNode*> usable_nodes(const Topology& topology) {
  std::vector<const NumaNode*> usable;
  for (const NumaNode& node : topology.nodes)
    if (!node.cpus.empty()) usable.push_back(&node);
  if (usable.empty()) usable.push_back(&topology.nodes.front());
  return usable;
}

// Some of the machine's nodes as one.
Node node_of(Nodes some, const Topology& topology, bool bound) {
  Node node;
  for (const NumaNode* member : some) {
    if (bound) node.cpus.insert(node.cpus.end(), member->cpus.begin(), member->cpus.end());
    const int from = memory_of(topology, *member);
    if ((topology.nodes.size() > 1 || topology.chosen) &&
        std::ranges::find(node.memory, from) == node.memory.end())
      node.memory.push_back(from);
  }
  return node;
}

std::string usable_ids(const std::vector<NumaNode>& nodes) {
  std::string text;
  for (const NumaNode& node : nodes)
    if (!node.cpus.empty()) text += (text.empty() ? "" : ", ") + std::to_string(node.id);
  return text;
}

}  // namespace

Topology choose_nodes(Topology topology, std::span<const int> nodes) {
  KT_CHECK(!nodes.empty(), "nodes is empty, wanted some of the NUMA nodes of this machine");
  std::vector<NumaNode> all = std::move(topology.nodes);
  topology.nodes.clear();
  topology.chosen = true;
  int cores = 0;
  for (const int id : nodes) {
    const auto found = std::ranges::find(all, id, &NumaNode::id);
    KT_CHECK(found != all.end() && !found->cpus.empty(), "nodes names node {}, which {}, wanted some of {}",
             id, found == all.end() ? "is not there" : "has no CPU that this process may use",
             usable_ids(all));
    if (std::ranges::find(topology.nodes, id, &NumaNode::id) == topology.nodes.end())
      cores += static_cast<int>(found->cores.size());
    topology.nodes.push_back(*found);
  }
  topology.cores = std::clamp(cores, 1, topology.cores);
  return topology;
}

ShardLayout plan_layout(const Topology& topology, int threads, int shards) {
  const std::vector<const NumaNode*> usable = usable_nodes(topology);
  const index_t count = std::min<index_t>({shards, threads, std::ssize(usable)});
  ShardLayout layout;
  std::vector<index_t> cores;  // of each node
  for (index_t n = 0; n < count; ++n) {
    const Nodes some = part_of(usable, split(std::ssize(usable), count, n));
    layout.nodes.push_back(node_of(some, topology, count > 1 || topology.chosen));
    cores.push_back(cores_of(some));
  }
  const std::vector<Range> shards_of = share_out(shards, cores), threads_of = share_out(threads, cores);
  for (std::size_t n = 0; n < layout.nodes.size(); ++n) {
    layout.nodes[n].shards = shards_of[n];
    layout.nodes[n].threads = static_cast<int>(threads_of[n].size());
    const Shard shard{cores[n] * kShares / shards_of[n].size(), n};
    layout.shards.insert(layout.shards.end(), static_cast<std::size_t>(shards_of[n].size()), shard);
  }
  return layout;
}

}  // namespace kt
