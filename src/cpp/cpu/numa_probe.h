// Whether memory can be placed on the nodes of this machine: some is, and looked for.
#pragma once

#include <vector>

#include "cpu/topology.h"

namespace kt {

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
