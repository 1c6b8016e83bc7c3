// The nodes of a runtime: NUMA nodes with the shards, the threads and the memory that each has. Pure.
#pragma once

#include <span>
#include <vector>

#include "base/split.h"
#include "cpu/topology.h"

namespace kt {

// A slice of the work and of the weights.
struct Shard {
  index_t weight = 1;    // its share of all work: by the cores behind it
  std::size_t node = 0;  // that owns and computes it
};

// A NUMA node, or several where there are fewer shards or threads. Its threads serve its shards, whichever is
// next.
struct Node {
  int threads = 1;
  Range shards;
  std::vector<int> cpus = {};    // that its threads may run on; none: any
  std::vector<int> memory = {};  // NUMA nodes that its memory comes from; none: the machine has but one
};

struct ShardLayout {
  std::vector<Shard> shards;
  std::vector<Node> nodes;
};

// The topology of some of its nodes, each as often as it is named. ValueError for one that is not there, or
// that has no CPU this process may use.
Topology choose_nodes(Topology topology, std::span<const int> nodes);

// As many nodes as there are NUMA nodes, shards and threads for. `threads`, `shards` >= 1.
ShardLayout plan_layout(const Topology& topology, int threads, int shards);

}  // namespace kt
