// Which shard each expert lives in, where experts stay whole. Pure.
#pragma once

#include <span>
#include <string_view>
#include <vector>

#include "moe/layer.h"

namespace kt {

// ValueError for a name that is not known.
Placement placement_from(std::string_view name);
std::string_view name_of(Placement placement);

// What assign_homes wants of a runtime's shards.
std::vector<index_t> weights_of(const Runtime& runtime);

// A shard for each expert. Shards have weights: their shares of the work. Experts with `popularity`, a number
// each: the most popular first, each to the shard that has least to do by its weight, as long as it has room:
// no shard holds more than its share of experts, rounded up, so that memory is shared out as well. With none,
// or nothing but zeros: neighbours together. ValueError for numbers that are too few, negative or not finite.
std::vector<int> assign_homes(int experts, std::span<const index_t> weights,
                              std::span<const double> popularity);

}  // namespace kt
