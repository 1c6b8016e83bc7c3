// The CPUs that a thread may run on, also where a machine has more than 1024; and whether the memory that it
// touches there lies on their NUMA node.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "cpu/topology.h"

namespace kt {

// Of the calling thread, ascending; empty where the kernel does not tell.
std::vector<int> affinity();

// Lets the calling thread run on these alone. False where the kernel refuses; no CPUs: nothing is asked.
bool set_affinity(std::span<const int> cpus) noexcept;

// Memory asked for on one node and first touched by a thread of that node.
struct NodeProbe {
  int node = 0;
  bool asked = false;        // the kernel took the wish (mbind)
  bool bound = false;        // there was a thread on the node's CPUs
  int pages = 0, right = 0;  // of them, on the node
  int unknown = 0;           // the kernel did not tell (move_pages)
};

// For every node with memory, `bytes` of it at a time.
std::vector<NodeProbe> probe_nodes(const Topology& topology, std::size_t bytes = std::size_t{4} << 20);

}  // namespace kt
