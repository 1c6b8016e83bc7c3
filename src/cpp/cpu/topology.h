// The part of the machine this process may use, read from /proc and /sys. Unknown numbers are 0.
#pragma once

#include <cstddef>
#include <optional>
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
  std::size_t cache_bytes = 0;  // pages of files, which the kernel drops when it has to; not in free_bytes
  bool memory_allowed = true;   // the cpuset lets this process have memory from here

  bool has_memory() const { return memory_bytes > 0 && memory_allowed; }
};

struct Topology {
  std::string model;
  int cpus = 1;   // in the affinity mask, no more than the cgroup's CPU limit (rounded up)
  int cores = 1;  // with a CPU among those, no more than `cpus`
  std::vector<NumaNode> nodes{{0, {}, {}, {10}}};
  bool chosen = false;                  // some of the nodes, to be bound to even if it is one
  std::size_t l1d = 0, l2 = 0, l3 = 0;  // bytes, as one core sees them

  // The rest is what the mask holds, whatever the cgroup's limit.
  int packages = 1;
  int threads_per_core = 1;                              // CPUs of the core that has most of them
  std::vector<std::vector<int>> l2_domains, l3_domains;  // CPUs that share a cache
  std::vector<int> online;                               // CPUs of the whole machine
  double cgroup_cpus = 0;                                // CPU limit; 0: none
  std::size_t cgroup_memory = 0;                         // bytes; 0: no limit
};

// Of the machine, or of one recorded below `root` in the directories sys and proc. `cpus`: instead of this
// thread's affinity mask, or of that in the recorded proc/self/status. Missing and damaged files leave what
// they say unknown. Every CPU of the mask that is online lies in one node; every node that is there is
// listed.
Topology read_topology(const std::string& root = "/",
                       const std::optional<std::vector<int>>& cpus = std::nullopt);

}  // namespace kt
