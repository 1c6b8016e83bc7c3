#include "cpu/layout.h"

#include <algorithm>
#include <string>
#include <thread>
#include <utility>

#include "base/error.h"
#include "base/memory.h"
#include "cpu/sysfs.h"

namespace kt {

namespace {

// A common multiple of small numbers, so that shares of a node are whole.
constexpr index_t kShares = 720720;

index_t cores_of(const NumaNode& node) { return std::max<index_t>(1, std::ssize(node.cores)); }

// The node itself, or the nearest one with memory for this process.
int memory_node_of(const Topology& topology, const NumaNode& node) {
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

using NumaNodes = std::span<const NumaNode* const>;

NumaNodes part_of(NumaNodes nodes, Range range) {
  return nodes.subspan(to_size(range.begin), to_size(range.size()));
}

index_t cores_of(NumaNodes nodes) {
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
Node node_of(NumaNodes some, const Topology& topology) {
  Node node;
  for (const NumaNode* member : some) {
    node.cpus.insert(node.cpus.end(), member->cpus.begin(), member->cpus.end());
    const int from = memory_node_of(topology, *member);
    if ((topology.nodes.size() > 1 || topology.chosen) &&
        std::ranges::find(node.memory_nodes, from) == node.memory_nodes.end())
      node.memory_nodes.push_back(from);
  }
  return node;
}

// Each node gets one thread at least; or where there are fewer, the first of some that follow one another.
void share_threads(std::vector<Node>& nodes, const std::vector<index_t>& cores, index_t threads,
                   bool chosen) {
  const index_t count = std::min(std::ssize(nodes), threads);
  std::vector<index_t> weights;
  for (index_t part = 0; part < count; ++part) {
    const Range some = split(std::ssize(nodes), count, part);
    Node& first = nodes[to_size(some.begin)];
    index_t& weight = weights.emplace_back(0);
    for (auto n = to_size(some.begin); n < to_size(some.end); ++n) {
      weight += cores[n];
      nodes[n].threads = 0;
      if (&nodes[n] == &first) continue;
      first.cpus.insert(first.cpus.end(), nodes[n].cpus.begin(), nodes[n].cpus.end());
      nodes[n].cpus.clear();
    }
  }
  const std::vector<Range> threads_of = share_out(threads, weights);
  for (index_t part = 0; part < count; ++part) {
    Node& first = nodes[to_size(split(std::ssize(nodes), count, part).begin)];
    first.threads = to_int(threads_of[to_size(part)].size());
    if (count == 1 && !chosen) first.cpus.clear();
  }
}

std::string usable_ids(const std::vector<NumaNode>& nodes) {
  std::string text;
  for (const NumaNode& node : nodes)
    if (!node.cpus.empty()) text += (text.empty() ? "" : ", ") + std::to_string(node.id);
  return text;
}

constexpr std::size_t kPage = 4096;

NodeProbe probe(const NumaNode& node, std::size_t bytes) {
  NodeProbe result{node.id};
  const Buffer memory(bytes);
  auto* const first = static_cast<char*>(memory.data());
  result.asked = place_memory(first, memory.size(), std::vector{node.id});
  std::vector<const void*> pages;
  for (std::size_t at = 0; at < bytes; at += kPage) pages.push_back(first + at);
  std::thread([&] {
    result.bound = !node.cpus.empty() && set_affinity(node.cpus);
    for (std::size_t at = 0; at < bytes; at += kPage) first[at] = 1;
  }).join();
  const std::vector<int> found = nodes_of(pages);
  result.pages = to_int(pages.size());
  result.right = to_int(std::ranges::count(found, node.id));
  result.unknown = to_int(std::ranges::count(found, -1));
  return result;
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
      cores += to_int(found->cores.size());
    topology.nodes.push_back(*found);
  }
  topology.cores = std::clamp(cores, 1, topology.cores);
  return topology;
}

ShardLayout plan_layout(const Topology& topology, int threads, int shards) {
  const std::vector<const NumaNode*> usable = usable_nodes(topology);
  const index_t count = std::min<index_t>(shards, std::ssize(usable));
  ShardLayout layout;
  std::vector<index_t> cores;  // of each node
  for (index_t n = 0; n < count; ++n) {
    const NumaNodes some = part_of(usable, split(std::ssize(usable), count, n));
    layout.nodes.push_back(node_of(some, topology));
    cores.push_back(cores_of(some));
  }
  share_threads(layout.nodes, cores, threads, topology.chosen);
  const std::vector<Range> shards_of = share_out(shards, cores);
  for (std::size_t n = 0; n < layout.nodes.size(); ++n) {
    layout.nodes[n].shards = shards_of[n];
    const Shard shard{cores[n] * kShares / shards_of[n].size(), n};
    layout.shards.insert(layout.shards.end(), to_size(shards_of[n].size()), shard);
  }
  return layout;
}

std::vector<NodeProbe> probe_nodes(const Topology& topology, std::size_t bytes) {
  std::vector<NodeProbe> probes;
  for (const NumaNode& node : topology.nodes)
    if (node.has_memory()) probes.push_back(probe(node, bytes));
  return probes;
}

}  // namespace kt
