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

// Nodes that serve the same shards.
struct Group {
  Range nodes;  // of the usable ones
  Range shards;
  index_t cores = 0;
};

}  // namespace

namespace {

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
  std::vector<const NumaNode*> usable;
  for (const NumaNode& node : topology.nodes)
    if (!node.cpus.empty()) usable.push_back(&node);
  if (usable.empty()) usable.push_back(&topology.nodes.front());
  const bool bound = topology.nodes.size() > 1 || topology.chosen;

  std::vector<Group> groups;
  const index_t count = std::min<index_t>(shards, std::ssize(usable));
  std::vector<index_t> weights;
  for (index_t g = 0; g < count; ++g) {
    Group group{split(std::ssize(usable), count, g), {}};
    for (index_t i = group.nodes.begin; i < group.nodes.end; ++i)
      group.cores += cores_of(*usable[static_cast<std::size_t>(i)]);
    weights.push_back(group.cores);
    groups.push_back(group);
  }
  ShardLayout layout;
  const std::vector<Range> shards_of = share_out(shards, weights);
  for (std::size_t g = 0; g < groups.size(); ++g) {
    groups[g].shards = shards_of[g];
    Shard shard{groups[g].cores * kShares / shards_of[g].size(), g};
    for (index_t i = groups[g].nodes.begin; bound && i < groups[g].nodes.end; ++i) {
      const int node = memory_of(topology, *usable[static_cast<std::size_t>(i)]);
      if (std::ranges::find(shard.memory, node) == shard.memory.end()) shard.memory.push_back(node);
    }
    layout.shards.insert(layout.shards.end(), static_cast<std::size_t>(shards_of[g].size()), shard);
  }

  weights.clear();
  const index_t teams = std::min<index_t>(count, threads);
  for (index_t t = 0; t < teams; ++t) {
    const Range members = split(count, teams, t);
    Team team;
    team.shards = {groups[static_cast<std::size_t>(members.begin)].shards.begin,
                   groups[static_cast<std::size_t>(members.end - 1)].shards.end};
    index_t cores = 0, first = groups[static_cast<std::size_t>(members.begin)].nodes.begin;
    const index_t last = groups[static_cast<std::size_t>(members.end - 1)].nodes.end;
    for (; first < last; ++first) {
      const NumaNode& node = *usable[static_cast<std::size_t>(first)];
      cores += cores_of(node);
      if (teams > 1 || topology.chosen) team.cpus.insert(team.cpus.end(), node.cpus.begin(), node.cpus.end());
    }
    weights.push_back(cores);
    layout.teams.push_back(team);
  }
  const std::vector<Range> threads_of = share_out(threads, weights);
  for (std::size_t t = 0; t < layout.teams.size(); ++t)
    layout.teams[t].threads = static_cast<int>(threads_of[t].size());
  return layout;
}

}  // namespace kt
