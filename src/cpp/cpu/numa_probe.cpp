#include "cpu/numa_probe.h"

#include <algorithm>
#include <thread>

#include "base/arena.h"
#include "base/numa.h"
#include "cpu/affinity.h"

namespace kt {

namespace {

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
  result.pages = static_cast<int>(pages.size());
  result.right = static_cast<int>(std::ranges::count(found, node.id));
  result.unknown = static_cast<int>(std::ranges::count(found, -1));
  return result;
}

}  // namespace

std::vector<NodeProbe> probe_nodes(const Topology& topology, std::size_t bytes) {
  std::vector<NodeProbe> probes;
  for (const NumaNode& node : topology.nodes)
    if (node.has_memory()) probes.push_back(probe(node, bytes));
  return probes;
}

}  // namespace kt
