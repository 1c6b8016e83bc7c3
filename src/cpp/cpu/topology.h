// The part of the machine this process may use, read from /proc and /sys. Unknown numbers are 0.
#pragma once

#include <cstddef>
#include <string>

namespace kt {

struct Topology {
  std::string model;
  int cpus = 1;  // in the affinity mask, no more than the cgroup's CPU limit (rounded up)
  int numa_nodes = 1;
  std::size_t l1d = 0, l2 = 0, l3 = 0;  // bytes, as one core sees them
};

Topology read_topology();

}  // namespace kt
