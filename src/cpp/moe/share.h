// What each shard has to do with the routes of a call: the quantities that the scaling model's sums are made
// of. Pure.
#pragma once

#include <vector>

#include "moe/cost.h"

namespace kt {

// Routes, the blocks they are in, and those of them in blocks that are packed.
struct Amount {
  double routes = 0, blocks = 0, packed = 0;

  Amount& operator+=(const Amount& more) {
    routes += more.routes, blocks += more.blocks, packed += more.packed;
    return *this;
  }
};

// The routes its products take, and more.
struct Share : Amount {
  double width = 0;                         // of the intermediate dimension in its products
  double part = 0;                          // of what all threads do together
  double home_routes = 0, home_blocks = 0;  // at home here: whose P and Q it computes or merges
  double experts = 0;                       // whose LoRA gradients of a slice it writes
  double weight_blocks = 0;                 // of experts whose weights lie here
};

std::vector<Share> share_out(const LayerCall& call, const Division& division, bool whole);

}  // namespace kt
