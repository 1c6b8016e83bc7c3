// How the work of a pass is cut: routes into blocks, the intermediate dimension into portions, a matrix into
// slices. Pure.
#pragma once

#include <array>

#include "base/projection.h"
#include "base/split.h"

namespace kt {

// Kernels count rows and columns of a tile in int.
inline int to_int(index_t n) { return static_cast<int>(n); }

// Most routes that share one packing of an expert's weights; enough to make the packing cheap.
inline constexpr index_t kBlockRows = 512;

// Bytes of weights that a task keeps in its L2 cache, at most: virtual machines hide that two of their cores
// share one of 2 MiB.
inline constexpr index_t kMostCacheBytes = index_t{512} << 10;

// Of a sum over experts: columns of a slice, at most, so rows of 1 KiB to write and to read again; and slices
// that are computed or wait for their sum at the same time.
inline constexpr index_t kSumCols = 256, kSumsKept = 3;

// The projections that read hidden_states, and the one that reads h.
inline constexpr std::array kGateUp{Projection::gate, Projection::up};
inline constexpr std::array kDown{Projection::down};

// Consecutive routes of one expert, on one shard: a block, or some of the routes of block `index`. The blocks
// of the same routes on all shards are siblings: they follow one another, and the first is at home, where
// what all of them share is computed.
struct Block {
  int expert;
  std::size_t shard, team;  // of those in the pass
  std::size_t index;
  std::size_t input;  // the sibling that packs their common input for its team
  index_t first, count;
};

// What a shard has of the intermediate dimension.
struct Portion {
  Range inner;
  std::size_t number, team, place;
};

// The cut of n columns (or rows of a weight) into `count` slices, cuts on multiples of `tile`. Slices at the
// end may be empty.
struct Slices {
  index_t n, count, tile;

  Range operator[](index_t i) const { return split(n, count, i, tile); }
};

}  // namespace kt
