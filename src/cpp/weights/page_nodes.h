// Whether the weights of a shard lie on its NUMA nodes, as the kernel tells of a sample of their pages.
#pragma once

#include <span>

#include "moe/layer.h"

namespace kt {

struct PageNodes {
  index_t wanted = 0, elsewhere = 0, unknown = 0;  // unknown: not in memory, or the kernel does not tell
};

// Of at most a few thousand pages, evenly over the shard's part of the weights: slices of all experts, or the
// experts at home there. No `nodes`: any will do.
PageNodes sample_pages(const ExpertWeights& weights, std::size_t shard, std::span<const int> nodes);

}  // namespace kt
