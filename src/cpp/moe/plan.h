// The plan of a pass: the routed tokens sorted by expert, which of them are multiplied together, on which
// shard and by which node, and into which ranges products are cut. Plain data, made without threads or
// memory.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "base/view.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"
#include "moe/layer.h"

namespace kt {

// The routed tokens of a call, (token, expert) pairs, sorted by expert, then token, then slot. Their number
// in that order is what "route" counts.
struct Routing {
  // [E + 1]: expert e has the routes from expert_offsets[e] up to expert_offsets[e + 1].
  std::vector<std::int32_t> expert_offsets;
  std::vector<std::int32_t> sorted_token_ids;  // [routes]
  std::vector<std::int32_t> sorted_slots;      // [routes]: token * K + slot, the place in topk_ids
  std::vector<std::int32_t> experts;           // those that have a routed token
  // The routes of token t, experts in order, are inverse_permutation[token_offsets[t]] up to [token_offsets[t
  // + 1]].
  std::vector<std::int32_t> token_offsets, inverse_permutation;

  index_t routes() const { return static_cast<index_t>(sorted_token_ids.size()); }
  index_t first(int expert) const { return expert_offsets[to_size(expert)]; }
  index_t count(int expert) const { return expert_offsets[to_size(expert) + 1] - first(expert); }
};

// topk_ids: [T, K] int32 or int64 in [0, E]; E means "no route". ValueError names the first entry outside.
index_t count_routes(const MatView& topk_ids, int num_experts);
// Of each expert, and last the entries that are no route: [E + 1].
std::vector<std::int32_t> count_routes_of_each(const MatView& topk_ids, int num_experts);
// The routes of some experts in the order given: writes permutation [their routes], the place of each in
// topk_ids, and inverse [T, K], the reverse of it; -1 where there is none of these. ValueError for an expert
// that is outside of [0, E) or comes twice, and for a permutation of another size.
void sort_routes(const MatView& topk_ids, int num_experts, const std::vector<int>& experts,
                 std::span<std::int32_t> permutation, std::span<std::int32_t> inverse);
Routing route(const MatView& topk_ids, int num_experts);

// A token block has at most so many rows: enough to make the packing of an expert's weights cheap.
inline constexpr index_t kBlockRows = 512;

// A task keeps at most so many bytes of weights in its L2 cache: virtual machines hide that two of their
// cores share one of 2 MiB.
inline constexpr index_t kMostCacheBytes = index_t{512} << 10;

// The projection that reads h.
inline constexpr std::array kDown{Projection::down};

// A token block on one shard, which is what a verb computes: consecutive routed tokens of one expert, and the
// shard's slice of the intermediate dimension. The shards of a token block follow one another, and the first
// is its root, which computes what all of them need, and reduces their partial sums.
struct Block {
  int expert;
  std::size_t shard, node;  // of those in the plan
  std::size_t index;        // in the plan
  std::size_t packer;       // the block of its node that packs the input that they have in common
  index_t first, count;     // its routed tokens
};

// All rows of a block, or some of them, such as an MC range. The block outlives them.
struct BlockRows {
  BlockRows(const Block& all) : block(all), rows{0, all.count} {}
  BlockRows(const Block& of, Range some) : block(of), rows(some) {}

  const Block& block;
  Range rows;  // of the block

  index_t first() const { return block.first + rows.begin; }  // of its routed tokens
  index_t count() const { return rows.size(); }
};

// Whether a block has so few rows that its products are GEMVs, which read the weights where they lie.
inline bool by_gemv(const Block& block) { return block.count <= kGemvRows; }

// A shard of the plan: its slice of the intermediate dimension, its number in the runtime and its node.
struct ShardSlice {
  Range range;
  std::size_t number, node;
};

// The n columns of a product, cut into `count` ranges of NC columns each, on multiples of `tile`. Ranges at
// the end may be empty.
struct NcRanges {
  index_t n, count, tile;

  Range operator[](index_t i) const { return split(n, count, i, tile); }
};

// The columns that task `task` computes, of tasks that take `per_task` ranges each.
Range nc_of_task(const NcRanges& ranges, index_t task, index_t per_task);

// Calls body(i, ranges[i], the range after it) for each range of a task; an empty one comes after the last.
template <class Body>
void for_nc_ranges(const NcRanges& ranges, index_t task, index_t per_task, const Body& body) {
  const index_t end = std::min(ranges.count, (task + 1) * per_task);
  for (index_t i = task * per_task; i < end; ++i) {
    const Range nc = ranges[i];
    if (nc.size() > 0) body(i, nc, i + 1 < end ? ranges[i + 1] : Range{nc.end, nc.end});
  }
}

// Cuts a block into MC ranges of at most `rows` rows.
template <class Body>
void for_mc_ranges(const Block& block, index_t rows, const Body& body) {
  for (index_t i = 0; i < block.count; i += rows)
    body(BlockRows(block, {i, std::min(i + rows, block.count)}));
}

class Plan {
 public:
  Plan(const Routing& routing, const ExpertWeights& experts, const KernelSet& kernels,
       const Workers& workers);

  std::vector<ShardSlice> shards;  // those that have some of the intermediate dimension
  std::vector<Block> blocks;       // every token block once a shard, experts in order
  std::vector<int> node_threads;
  int threads = 0;
  index_t most_rows = 0;    // of a block
  index_t cache_bytes = 0;  // of weights that a task keeps in its L2 cache
  bool all_by_gemv = true;  // every block

  bool is_root(const Block& block) const { return block.index % shards.size() == 0; }
  // All shards of the same token block, its root first.
  std::span<const Block> token_block(const Block& block) const {
    return std::span(blocks).subspan(block.index - block.index % shards.size(), shards.size());
  }
  const Block& root(const Block& block) const { return token_block(block).front(); }
  // The columns of the intermediate dimension that a block has.
  const Range& slice(const Block& block) const { return shards[block.shard].range; }
  index_t width(const Block& block) const { return slice(block).size(); }

  // Cuts n columns so that `bytes` of weights a column fill a part of the L2 cache; where every block
  // is multiplied by GEMV, into as many ranges as keep the threads busy.
  NcRanges nc_ranges(index_t n, index_t tile, index_t bytes) const;
  // How many ranges of a block one task takes, one after the other.
  index_t ranges_per_task(const NcRanges& ranges) const;

  // Cuts a block into the MC ranges of forward products, whose tiles hold `nr` rows: whole tiles, and behind
  // them an edge of half a tile, or of so few rows that a GEMV is cheaper than a tile.
  template <class Body>
  void for_forward_mc_ranges(const Block& block, const Body& body) const {
    const index_t tile = kernels_.gemm.nr, half = tile / 2, edge = kernels_.gemm.max_edge;
    for (index_t i = 0, rows; i < block.count; i += rows) {
      const index_t left = block.count - i;
      rows = left <= edge || left > half + edge ? std::min(tile, left) : std::min(half, left);
      body(BlockRows(block, {i, i + rows}));
    }
  }

 private:
  void add_token_block(Block block, bool expert_parallel);

  const KernelSet& kernels_;
};

// The order in which a node's inputs are packed and multiplied. Packing runs some blocks ahead, by a node's
// threads, so that products seldom wait, into a ring of slots, each free again when its products are done.
struct PackSchedule {
  struct Action {
    std::size_t block;
    bool packs;  // its input; else multiplies it
    index_t slot = 0;
    std::size_t emptied =
        kNone;  // whose products, by the block that packed for them, must be done with the slot
  };
  static constexpr std::size_t kNone = ~std::size_t{0};

  explicit PackSchedule(const Plan& plan);

  std::vector<index_t> slots;  // of each node's ring
  std::vector<Action> actions;
};

// The blocks that read the input that `packer` packed.
template <class Body>
void for_readers(const Plan& plan, std::size_t packer, const Body& body) {
  for (const Block& block : plan.token_block(plan.blocks[packer]))
    if (block.packer == packer) body(block);
}

}  // namespace kt
