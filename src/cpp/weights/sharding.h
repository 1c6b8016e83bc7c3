// How the experts of a layer are divided among the shards of a runtime: in slices of the intermediate
// dimension, or each expert whole. Pure.
#pragma once

#include <array>
#include <span>
#include <string_view>
#include <vector>

#include "moe/layer.h"

namespace kt {

// ValueError for a name that is not known.
Placement placement_from(std::string_view name);
std::string_view name_of(Placement placement);

struct ShardingOptions {
  Placement placement = Placement::tensor;
  std::vector<double> popularity = {};  // of each expert; none: they are alike
};

// ValueError for popularity that does not fit.
Sharding divide(const LayerShape& layer, const Runtime& runtime, const ShardingOptions& options);

// Cuts on multiples of this leave a slice's codes whole bytes, its rows whole cache lines, and every block
// that shares a scale in one slice; unless the block is as long as the dimension: its scale then goes to
// every slice. A slice cuts gate and up between rows, down between columns.
index_t cut_align(const std::array<WeightType, 3>& types, index_t intermediate);

// A runtime's shards by their shares of the work.
std::vector<index_t> weights_of(const Runtime& runtime);

// A shard for each expert. Shards have weights: their shares of the work. Experts with `popularity`, a number
// each: the most popular first, each to the shard that has least to do by its weight, as long as it has room:
// no shard holds more than its share of experts, rounded up, so that memory is shared out as well. With none,
// or nothing but zeros: neighbours together. ValueError for numbers that are too few, negative or not finite.
std::vector<int> assign_homes(int experts, std::span<const index_t> weights,
                              std::span<const double> popularity);

}  // namespace kt
