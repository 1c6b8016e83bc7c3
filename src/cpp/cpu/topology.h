// The part of the machine this process may use, read from /proc and /sys. Unknown numbers are 0.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

namespace kt {

// A NUMA node: CPUs, memory, or both.
struct NumaNode {
  int id = 0;                       // the kernel's number; there may be gaps
  std::vector<int> cpus = {};       // those this process may run on
  std::vector<int> cores = {};      // of them, the first of each core
  std::vector<int> distances = {};  // to every node of the list; 10 is its own
  std::size_t memory_bytes = 0, free_bytes = 0;
};

struct Topology {
  std::string model;
  int cpus = 1;   // in the affinity mask, no more than the cgroup's CPU limit (rounded up)
  int cores = 1;  // with a CPU among those, no more than `cpus`
  std::vector<NumaNode> nodes{{0, {}, {}, {10}}};
  bool chosen = false;                  // some of the nodes, to be bound to even if it is one
  std::size_t l1d = 0, l2 = 0, l3 = 0;  // bytes, as one core sees them
};

Topology read_topology();

}  // namespace kt
