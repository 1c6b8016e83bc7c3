// The nodes of a runtime: NUMA nodes with the shards, the threads and the memory that each has. And whether
// memory can be placed on the nodes of this machine: some is, and looked for.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "base/view.h"
#include "cpu/topology.h"

namespace kt {

// A slice of the work and of the weights.
struct Shard {
  index_t weight = 1;    // its share of all work: by the cores behind it
  std::size_t node = 0;  // that owns and computes it
};

// A NUMA node, or several where there are fewer shards. Its threads serve its shards, whichever is next;
// those of a node without threads are served by the last node before it that has some.
struct Node {
  int threads = 1;
  Range shards;
  std::vector<int> cpus = {};          // that its threads may run on; none: any
  std::vector<int> memory_nodes = {};  // NUMA nodes that its memory comes from; none: the machine has but one
};

struct ShardLayout {
  std::vector<Shard> shards;
  std::vector<Node> nodes;
};

// The topology of some of its nodes, each as often as it is named. ValueError for one that is not there, or
// that has no CPU this process may use.
Topology choose_nodes(Topology topology, std::span<const int> nodes);

// As many nodes as there are NUMA nodes and shards for, whatever the number of threads, so that results do
// not depend on it; the first node has some. `threads`, `shards` >= 1.
ShardLayout plan_layout(const Topology& topology, int threads, int shards);

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
