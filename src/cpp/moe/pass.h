// What the forward and the backward pass of one call share: routing, blocks of routes, and the steps that
// backward repeats when it recomputes.
#pragma once

#include <algorithm>
#include <functional>
#include <initializer_list>
#include <span>
#include <vector>

#include "base/split.h"
#include "gemm/gemm.h"
#include "moe/layer.h"
#include "moe/routing.h"
#include "moe/task_list.h"

namespace kt {

// Most routes that share one packing of an expert's weights; enough to make the packing cheap.
inline constexpr index_t kBlockRows = 512;

// The projections that read hidden_states, and the one that reads h.
inline constexpr std::array kGateUp{Projection::gate, Projection::up};
inline constexpr std::array kDown{Projection::down};

// Consecutive routes of one expert: a block, or a part of block `index`.
struct Block {
  int expert;
  std::size_t index;
  index_t first, count;
};

// The cut of n columns (or rows of a weight) into `count` slices, cuts on multiples of `tile`. Slices at the
// end may be empty.
struct Slices {
  index_t n, count, tile;

  Range operator[](index_t i) const { return split(n, count, i, tile); }
};

class Pass {
 public:
  Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs);

 protected:
  using Group = TaskList::Group;

  // The input of a forward product, a block's rows: packed once for all slices of the weights. Nothing where
  // the rows are few.
  struct ForwardInput {
    PackedB rows;
    std::array<PackedB, 3> low_rank;  // P of the projections that read these rows
  };

  // Adds the tasks that compute G, U = X W' + P B' + b and h = act(G, U). `saved` may be null pointers.
  void add_gate_up(const Saved& saved);

  // Packs the input of some projections that read the same rows, and computes and packs their P; `into` is
  // forward_input_bytes long.
  void pack_forward_input(std::span<const Projection> targets, Block block, char* into, ForwardInput& input,
                          Arena& scratch);
  index_t forward_input_bytes(std::span<const Projection> targets, index_t routes) const;

  // The first LoRA product of a block, scaled: P' = s (X A')' [r, count] from the packed rows (none: from the
  // rows themselves), rounded to bf16; that of down also times the routing weight. To where there is memory.
  void project_a(Projection p, Block block, PackedB packed, Arena& scratch);

  // The rows of a block in a [T, n] matrix, and in a [routes, n] one.
  Rows by_token(const MatView& matrix, Block block, Range cols) const;
  Rows by_route(const bf16_t* matrix, index_t row_length, Block block, Range cols) const;
  // The input of a projection, rows of a block; for its LoRA A with dropped elements zero.
  Rows input(Projection p, Block block, Range cols) const;
  Rows lora_input(Projection p, Block block, Range cols, Arena& scratch) const;
  // P' or Q' of a part of a block: [r, count].
  MatView low_rank_of(const bf16_t* low_rank, index_t rank, Block part) const;

  // Rows so few that their products read the weights as they are, without packing.
  bool few(Block part) const { return blocks_[part.index].count <= kernels().few.max_rows; }
  bool all_few() const {
    return std::ranges::all_of(blocks_, [this](Block block) { return few(block); });
  }

  // W, LoRA B and the bias of a projection, rows `slice`: as left operands, unless the block has few rows.
  struct ForwardWeights {
    WeightBlock weights;
    Rows lora_b;
    const bf16_t* bias;  // null: none
    PackedA packed_weights, packed_lora_b;
    MatView next;  // weights that this task needs next
  };
  ForwardWeights forward_weights(Projection p, Block block, Range slice, Range next, Arena& scratch) const;
  WeightBlock weight_rows(Projection p, int expert, Range slice) const {
    return {&experts_.of(p, expert), slice, {0, experts_.cols(p)}};
  }
  // result [part.count, slice] = input W' + P B' + b, rows `stride` floats apart; a part is at most nr
  // routes.
  void multiply_forward(Projection p, const ForwardWeights& weights, const ForwardInput& in, Block part,
                        float* result, index_t stride, Arena& scratch) const;

  // Adds the tasks that compute a [T, H] result: the sum over a token's routes, experts in order, of what
  // product(block, strip, next strip, rows, stride, scratch) writes to `rows`, times the routing weight if
  // `weighted`. The product of a block waits for its group of `ready`. `tile` and `bytes` of weights a
  // column cut the result into slices, and those into strips.
  using Product =
      std::function<void(Block block, Range strip, Range next, float* rows, index_t stride, Arena& scratch)>;
  void add_sum(const Result& result, bool weighted, index_t tile, index_t bytes,
               const std::vector<const Group*>& ready, Product product);

  // Cuts `block` into parts for forward products: whole tiles, and in the end half a tile or few rows where
  // those save a large part of a tile.
  template <class Body>
  void for_tiles(Block block, const Body& body) const {
    const index_t tile = kernels().gemm.nr, half = tile / 2, tail = kernels().few.max_tail;
    for (index_t i = 0, rows; i < block.count; i += rows) {
      const index_t left = block.count - i;
      rows = left <= tail || left > half + tail ? std::min(tile, left) : std::min(half, left);
      body(Block{block.expert, block.index, block.first + i, rows});
    }
  }

  // Cuts `block` into parts of at most `rows` routes.
  template <class Body>
  static void for_parts(Block block, index_t rows, const Body& body) {
    for (index_t i = 0; i < block.count; i += rows)
      body(Block{block.expert, block.index, block.first + i, std::min(rows, block.count - i)});
  }
  // Where a part lies in its block.
  Range within(Block part) const {
    const index_t begin = part.first - blocks_[part.index].first;
    return {begin, begin + part.count};
  }

  // Adds for every block a task pack(block, memory, scratch), and tasks that wait for it and call
  // multiply(block, i, slices[i], the slice after it, scratch); done[b] becomes the group of the latter.
  // Packing runs some blocks ahead, so that products seldom wait, in a ring of pieces of `bytes`, each free
  // again when its products are done.
  template <class Pack, class Multiply>
  void add_with_input(index_t bytes, Pack pack, const Slices& slices, Multiply multiply,
                      std::vector<const Group*>& done) {
    const index_t run = slices_per_task(slices), count = ceil_div(slices.count, run);
    const std::size_t blocks = blocks_.size(), kept = std::min(blocks, 2 * inputs_ahead_);
    char* ring = memory().take<char>(static_cast<index_t>(kept) * bytes);
    std::vector<const Group*> packed(blocks);
    done.resize(blocks);
    const auto add_pack = [&](std::size_t b) {
      const Group* emptied = b >= kept ? done[b - kept] : nullptr;
      char* piece = ring + static_cast<index_t>(b % kept) * bytes;
      packed[b] = tasks_.add(1, [=, this](index_t, Arena& scratch) {
        if (emptied != nullptr) tasks_.wait(emptied);
        pack(blocks_[b], piece, scratch);
      });
    };
    const auto add_products = [&](std::size_t b) {
      done[b] = tasks_.add(count, [=, this, input = packed[b]](index_t task, Arena& scratch) {
        tasks_.wait(input);
        for_slices(slices, task, run, [&](index_t i, Range slice, Range next) {
          const Arena::Frame frame(scratch);
          multiply(blocks_[b], i, slice, next, scratch);
        });
      });
    };
    for (std::size_t b = 0; b < blocks + inputs_ahead_; ++b) {
      if (b < blocks) add_pack(b);
      if (b >= inputs_ahead_) add_products(b - inputs_ahead_);
    }
  }

  // P of a block's rows in natural order, [count, r].
  Rows low_rank_rows(Projection p, Block block, Arena& scratch) const;

  // n columns, cut so that `bytes` of weights a column fill a part of the L2 cache; where every block
  // has few rows, into as many slices as keep the threads busy.
  Slices slices(index_t n, index_t tile, index_t bytes) const;

  // How many of a block's slices a task takes, one after the other.
  index_t slices_per_task(const Slices& slices) const;
  // Calls body(i, slices[i], the slice after it) for the slices of a task; none is after the last.
  template <class Body>
  static void for_slices(const Slices& slices, index_t task, index_t per_task, const Body& body) {
    const index_t end = std::min(slices.count, (task + 1) * per_task);
    for (index_t i = task * per_task; i < end; ++i) {
      const Range slice = slices[i];
      if (slice.size() > 0) body(i, slice, i + 1 < end ? slices[i + 1] : Range{slice.end, slice.end});
    }
  }
  // One row of fp32 results, stored in the wanted type.
  void store(const float* row, index_t n, const Result& result, index_t offset) const;

  bf16_t* take_low_rank(Projection p) {
    return memory().take<bf16_t>(inputs_.of(p).rank() * routing_.routes());
  }
  Arena& memory() { return lease_.memory(); }
  const KernelSet& kernels() const { return lease_.kernels(); }
  float lora_scale(Projection p) const;
  float weight(index_t route) const { return weight_[static_cast<std::size_t>(route)]; }

  // Bytes of weights that a task keeps in its L2 cache: half of it, 512 KiB at most, for virtual machines
  // hide that two of their cores share one, and caches of 2 MiB are such.
  index_t cache_part() const {
    return std::min(static_cast<index_t>(lease_.l2_bytes()) / 2, index_t{512} << 10);
  }

  Runtime::Lease lease_;
  int threads_;
  std::size_t inputs_ahead_;  // blocks whose input is packed ahead of their products
  const ExpertWeights& experts_;
  const LayerInputs& inputs_;
  const ActivationKernels& activation_;
  Routing routing_;
  std::vector<Block> blocks_;            // every route once, experts in order
  std::vector<float> weight_;            // routing weight of every route
  std::array<bf16_t*, 3> low_rank_{};    // P' of each projection with LoRA
  bf16_t* weighted_low_rank_ = nullptr;  // P' of down times the routing weights
  bf16_t* hidden_ = nullptr;             // h, [routes, I]
  TaskList tasks_;
  std::vector<const Group*> gate_up_done_;  // a block each

 private:
  void gate_up(Block block, Range slice, Range next, const ForwardInput& in, const Saved& saved,
               Arena& scratch) const;
  void sum_routes(Range tokens, Range slice, const float* rows, index_t stride, const Result& result,
                  bool weighted, Arena& scratch) const;

  std::vector<ForwardInput> hidden_states_;  // a block each
};

}  // namespace kt
