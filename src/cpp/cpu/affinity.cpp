#include "cpu/affinity.h"

#include <sched.h>

#include <algorithm>
#include <memory>
#include <thread>

#include "base/memory.h"
#include "cpu/sysfs.h"

namespace kt {

namespace {

struct FreeMask {
  void operator()(cpu_set_t* mask) const { CPU_FREE(mask); }
};
using Mask = std::unique_ptr<cpu_set_t, FreeMask>;

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

std::vector<int> affinity() {
  // The mask grows until the kernel accepts it.
  for (int most = CPU_SETSIZE; most <= kMostIds; most *= 2) {
    const Mask mask(CPU_ALLOC(most));
    const std::size_t bytes = CPU_ALLOC_SIZE(most);
    if (!mask || sched_getaffinity(0, bytes, mask.get()) != 0) continue;
    std::vector<int> cpus;
    for (int cpu = 0; cpu < most; ++cpu)
      if (CPU_ISSET_S(cpu, bytes, mask.get())) cpus.push_back(cpu);
    return cpus;
  }
  return {};
}

bool set_affinity(std::span<const int> cpus) noexcept {
  if (cpus.empty()) return true;
  const auto [lowest, highest] = std::ranges::minmax(cpus);
  if (lowest < 0 || highest >= kMostIds) return false;
  const Mask mask(CPU_ALLOC(highest + 1));
  if (!mask) return false;
  const std::size_t bytes = CPU_ALLOC_SIZE(highest + 1);
  CPU_ZERO_S(bytes, mask.get());
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, mask.get());
  return sched_setaffinity(0, bytes, mask.get()) == 0;
}

std::vector<NodeProbe> probe_nodes(const Topology& topology, std::size_t bytes) {
  std::vector<NodeProbe> probes;
  for (const NumaNode& node : topology.nodes)
    if (node.has_memory()) probes.push_back(probe(node, bytes));
  return probes;
}

}  // namespace kt
