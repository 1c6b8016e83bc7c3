// What each shard has to do with the routes of a call: the quantities that the scaling model's sums are made
// of. Pure.
#pragma once

#include <vector>

#include "moe/cost.h"

namespace kt {

struct Share {
  double width = 0;   // of the intermediate dimension in its products
  double part = 0;    // of what all threads do together
  double routes = 0;  // that its products take, in `blocks`; those in blocks worth packing
  double blocks = 0, packed = 0;
  double home_routes = 0, home_blocks = 0;  // whose low-rank products it merges, and uses where not sliced
  double experts = 0;                       // whose LoRA gradients of a slice it writes
  double weight_blocks = 0;                 // of experts whose weights lie here
};

std::vector<Share> share_out(const LayerCall& call, const Division& division, bool whole);

}  // namespace kt
