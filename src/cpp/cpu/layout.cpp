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

// NUMA nodes that own the same shards.
struct NodeGroup {
  Nodes nodes;
  Range shards;
};

std::vector<NodeGroup> groups_of(Nodes nodes, index_t shards) {
  const index_t count = std::min(shards, std::ssize(nodes));
  std::vector<NodeGroup> groups;
  std::vector<index_t> weights;
  for (index_t p = 0; p < count; ++p) {
    groups.push_back({part_of(nodes, split(std::ssize(nodes), count, p)), {}});
    weights.push_back(cores_of(groups.back().nodes));
  }
  const std::vector<Range> ranges = share_out(shards, weights);
  for (std::size_t p = 0; p < groups.size(); ++p) groups[p].shards = ranges[p];
  return groups;
}

std::vector<Shard> shards_of(const std::vector<NodeGroup>& groups, const Topology& topology) {
  const bool bound = topology.nodes.size() > 1 || topology.chosen;
  std::vector<Shard> shards;
  for (std::size_t p = 0; p < groups.size(); ++p) {
    const NodeGroup& group = groups[p];
    Shard shard{cores_of(group.nodes) * kShares / group.shards.size(), p};
    for (const NumaNode* node : group.nodes)
      if (const int from = memory_of(topology, *node);
          bound && std::ranges::find(shard.memory, from) == shard.memory.end())
        shard.memory.push_back(from);
    shards.insert(shards.end(), static_cast<std::size_t>(group.shards.size()), shard);
  }
  return shards;
}

// A team for each group of nodes; or where there are fewer threads, for some that follow one another.
std::vector<Team> teams_of(const std::vector<NodeGroup>& groups, const Topology& topology, index_t threads) {
  const index_t count = std::min(std::ssize(groups), threads);
  const bool bound = count > 1 || topology.chosen;
  std::vector<Team> teams(static_cast<std::size_t>(count));
  std::vector<index_t> weights;
  for (std::size_t t = 0; t < teams.size(); ++t) {
    const Range some = split(std::ssize(groups), count, static_cast<index_t>(t));
    const auto members = std::span(groups).subspan(static_cast<std::size_t>(some.begin),
                                                   static_cast<std::size_t>(some.size()));
    teams[t].shards = {members.front().shards.begin, members.back().shards.end};
    index_t cores = 0;
    for (const NodeGroup& group : members) {
      cores += cores_of(group.nodes);
      for (const NumaNode* node : group.nodes)
        if (bound) teams[t].cpus.insert(teams[t].cpus.end(), node->cpus.begin(), node->cpus.end());
    }
    weights.push_back(cores);
  }
  const std::vector<Range> threads_of = share_out(threads, weights);
  for (std::size_t t = 0; t < teams.size(); ++t) teams[t].threads = static_cast<int>(threads_of[t].size());
  return teams;
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
  const std::vector<const NumaNode*> nodes = usable_nodes(topology);
  const std::vector<NodeGroup> groups = groups_of(nodes, shards);
  return {shards_of(groups, topology), teams_of(groups, topology, threads)};
}

}  // namespace kt
