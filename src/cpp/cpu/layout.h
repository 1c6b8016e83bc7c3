// Which threads compute which shards, and the NUMA nodes that both live on. Pure.
#pragma once

#include <span>
#include <vector>

#include "base/split.h"
#include "cpu/topology.h"

namespace kt {

// A slice of the work and of the weights.
struct Shard {
  index_t weight = 1;            // its share of all work: by the cores behind it
  std::size_t node = 0;          // the NUMA node, or group of nodes, that owns it
  std::vector<int> memory = {};  // nodes its memory comes from; none: the machine has but one
};

// Threads that serve the same shards, whichever is next.
struct Team {
  int threads = 1;
  Range shards;
  std::vector<int> cpus = {};  // that its threads may run on; none: any
};

struct ShardLayout {
  std::vector<Shard> shards;
  std::vector<Team> teams;
};

// The topology of some of its nodes, each as often as it is named. ValueError for one that is not there, or
// that has no CPU this process may use.
Topology choose_nodes(Topology topology, std::span<const int> nodes);

// Every shard has nodes of its own, or where there are fewer nodes, shares one; teams are as many as there
// are nodes, shards and threads for. `threads`, `shards` >= 1.
ShardLayout plan_layout(const Topology& topology, int threads, int shards);

}  // namespace kt
