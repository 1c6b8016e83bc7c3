// What the forward and the backward pass of one call share: routing, blocks of routes, and the steps that
// backward repeats when it recomputes.
#pragma once

#include <algorithm>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "gemm/gemm.h"
#include "moe/block.h"
#include "moe/layer.h"
#include "moe/routing.h"
#include "moe/task_list.h"

namespace kt {

// The longest sum of products: the gradient of the hidden states, over gate and up of all shards, and LoRA.
static_assert(2 * kMostShards + 2 <= kMostTerms);

class Pass {
 public:
  Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, Direction direction);

 protected:
  using Group = TaskList::Group;

  // A matrix of the routes of each block; or none of any.
  using ByBlock = std::vector<bf16_t*>;

  // The input of a forward product, a block's rows: packed once for all slices of the weights. Nothing where
  // the rows are few.
  struct ForwardInput {
    PackedB rows;
    std::array<PackedB, 3> low_rank;  // P of the projections that read these rows
  };

  // Adds the tasks that compute G, U = X W' + P B' + b and h = act(G, U).
  void add_gate_up();

  // Packs the input of some projections that read the same rows, and computes and packs their P; `into` is
  // forward_input_bytes long. With `home`, P is what that group of tasks computes.
  void pack_forward_input(std::span<const Projection> targets, Block block, char* into, const Group* home,
                          ForwardInput& input, Arena& scratch);
  // `cols` of the input, for so many routes.
  index_t forward_input_bytes(std::span<const Projection> targets, index_t routes, index_t cols) const;

  // The two halves of it: they return what is behind them.
  char* pack_input(Projection p, Block block, char* into, ForwardInput& input) const;
  char* pack_low_rank(Projection p, Block block, char* into, ForwardInput& input) const;

  // The first LoRA product of a block, X A' transposed, [r, result_stride(count)], from the packed rows
  // (none: from the rows themselves).
  void multiply_a(Projection p, Block block, PackedB packed, float* product, Arena& scratch) const;
  // P' = s (X A')' [r, count] of it, rounded to bf16; that of down also times the routing weight. To where
  // there is memory.
  void keep_low_rank(Projection p, Block block, float* product);
  index_t product_floats(Projection p, Block block) const {
    return inputs_.of(p).rank() * result_stride(kernels(), block.count);
  }

  // Adds for every block a task that waits for its group of `ready` and computes floats(block)
  // numbers. These are added up over siblings, shards in order; finish is called at home with the sum.
  // done[b] becomes the group of block b's task.
  struct Reduced {
    std::function<index_t(Block block)> floats;
    std::function<void(Block block, float* product, Arena& scratch)> compute, finish;
  };
  void add_reduced(Stage stage, const std::vector<const Group*>& ready, Reduced steps,
                   std::vector<const Group*>& done);

  // The rows of a part of a block in a [T, n] matrix, and in the block's own [count, row_length].
  Rows by_token(const MatView& matrix, Block part, Range cols) const;
  Rows by_route(const ByBlock& matrices, index_t row_length, Block part, Range cols) const;
  // The input of a projection, rows of a block; for its LoRA A with dropped elements zero.
  Rows input(Projection p, Block block, Range cols) const;
  Rows lora_input(Projection p, Block block, Range cols, Arena& scratch) const;
  // P' or Q' of a part of a block: [r, count].
  MatView low_rank_of(const ByBlock& low_rank, index_t rank, Block part) const;

  // Rows so few that their products read the weights as they are, without packing.
  bool few(Block part) const { return blocks_[part.index].count <= kernels().few.max_rows; }
  bool all_few() const {
    return std::ranges::all_of(blocks_, [this](Block block) { return few(block); });
  }

  // W, LoRA B and the bias of a projection, rows `slice`: as left operands, unless the block has few rows;
  // and the input they are for. LoRA B and bias of down at home alone.
  struct ForwardWeights {
    Block block;
    const ForwardInput* input;
    WeightBlock weights;
    Rows lora_b;
    const bf16_t* bias;  // null: none
    PackedA packed_weights, packed_lora_b;
    MatView next;  // weights that this task needs next
    bool lora;
  };
  ForwardWeights forward_weights(Projection p, Block block, const ForwardInput& input, Range slice,
                                 Range next, Arena& scratch) const;
  // A shard's part of a projection: of W, and of the LoRA A and B that are cut with it.
  WeightBlock weights_of(Projection p, Block block) const;
  // In proportion to all of the matrix, with the scales.
  static index_t bytes_of(const WeightBlock& weights);
  static Stage packing(const WeightBlock& weights) {
    return weights.weight->type.format == Format::bf16 ? Stage::pack : Stage::decode;
  }
  MatView lora_a(Projection p, Block block) const;
  MatView lora_b(Projection p, Block block) const;
  // result [part.count, slice] = input W' + P B' + b, summed over siblings, rows `stride` floats apart; a
  // part is at most nr routes.
  void multiply_forward(Projection p, std::span<const ForwardWeights> weights, Block part, float* result,
                        index_t stride, Arena& scratch) const;
  void multiply_few_forward(Projection p, const ForwardWeights& weights, Block part, float* result,
                            index_t stride, bool accumulate, Arena& scratch) const;

  // Adds the tasks that compute a [T, H] result: the sum over a token's routes, experts in order, of what
  // product(siblings, strip, next strip, rows, stride, scratch) writes to `rows`, times the routing weight if
  // `weighted`; of several places each adds up its own, and then these sums are, places in order. The product
  // of a block waits for its group of `ready`. `tile`, and `inner_bytes` of weights a column for each of the
  // intermediate dimension, cut the result into slices, and those into strips.
  using Siblings = std::vector<Block>;  // of one place, shards in order
  using Product = std::function<void(const Siblings& blocks, Range strip, Range next, float* rows,
                                     index_t stride, Arena& scratch)>;
  void add_sum(Stage stage, const Result& result, bool weighted, index_t tile, index_t inner_bytes,
               const std::vector<const Group*>& ready, Product product);

  // Cuts `block` into parts for forward products: whole tiles, and in the end half a tile or few rows where
  // those save a large part of a tile.
  template <class Body>
  void for_tiles(Block block, const Body& body) const {
    const index_t tile = kernels().gemm.nr, half = tile / 2, tail = kernels().few.max_tail;
    for (index_t i = 0, rows; i < block.count; i += rows) {
      const index_t left = block.count - i;
      rows = left <= tail || left > half + tail ? std::min(tile, left) : std::min(half, left);
      body(some(block, i, rows));
    }
  }

  // Cuts `block` into parts of at most `rows` routes.
  template <class Body>
  static void for_parts(Block block, index_t rows, const Body& body) {
    for (index_t i = 0; i < block.count; i += rows) body(some(block, i, std::min(rows, block.count - i)));
  }
  static Block some(Block block, index_t first, index_t count) {
    block.first += first, block.count = count;
    return block;
  }
  // The same routes of a sibling.
  Block of_sibling(Block sibling, Block part) const { return some(sibling, within(part).begin, part.count); }
  // Where a part lies in its block.
  Range within(Block part) const {
    const index_t begin = part.first - blocks_[part.index].first;
    return {begin, begin + part.count};
  }

  // Adds for every block that packs for its siblings a task to do so, `home` the group that packs at home, or
  // null if it is this one; and for every block tasks that wait for it and multiply slice i of its shard's
  // `slices`, of which `next` follows; done[b] becomes the group of the latter. Packing runs some blocks
  // ahead, by a team's threads, so that products seldom wait, in a ring of pieces of `bytes`, each free again
  // when its products are done.
  struct WithInput {
    std::function<void(Block block, char* memory, const Group* home, Arena& scratch)> pack;
    std::function<void(Block block, index_t i, Range slice, Range next, Arena& scratch)> multiply;
  };
  void add_with_input(Stage stage, index_t bytes, const std::vector<Slices>& slices, WithInput steps,
                      std::vector<const Group*>& done);

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

  // Matrices [count, inner] in memory of the blocks' teams, and those that lie in memory of the caller:
  // shards one after the other, [routes, inner]. Of null none.
  ByBlock take_inner();
  ByBlock cut_inner(bf16_t* matrix) const;
  // The same of P or Q, [r, count] or [count, r]: siblings have one in common, at home.
  ByBlock take_low_rank(Projection p);
  ByBlock cut_low_rank(Projection p, bf16_t* matrix) const;
  Arena& memory(Block block) { return lease_.memory(block.team); }

  bool at_home(Block block) const { return block.index % shards_.size() == 0; }
  std::size_t home_of(Block block) const { return block.index - block.index % shards_.size(); }
  // Columns of the intermediate dimension on the block's shard.
  index_t inner(Block block) const { return shards_[block.shard].inner.size(); }
  index_t rows(Projection p, Block block) const {
    return p == Projection::down ? experts_.hidden : inner(block);
  }
  index_t cols(Projection p, Block block) const {
    return p == Projection::down ? inner(block) : experts_.hidden;
  }
  // Of a projection on this shard, in all of it.
  index_t first_row(Projection p, Block block) const {
    return p == Projection::down ? 0 : shards_[block.shard].inner.begin;
  }
  index_t first_col(Projection p, Block block) const {
    return p == Projection::down ? shards_[block.shard].inner.begin : 0;
  }

  void run_tasks();

  // What the profile says of this thread, if there is one, and what it calls the tasks of a block.
  Recorder* recorder(const Arena& scratch) const { return lease_.recorder(scratch); }
  Label label(Stage stage, Block block) const;
  void count(const Arena& scratch, const Work& work) const {
    if (Recorder* own = recorder(scratch); own != nullptr) [[unlikely]]
      own->count(work);
  }
  // Bytes of one team's memory that another reads or writes.
  static Work moved(index_t bytes, std::size_t memory, std::size_t team) {
    return memory == team ? Work{0, bytes, 0} : Work{0, 0, bytes};
  }

  const KernelSet& kernels() const { return lease_.kernels(); }
  float lora_scale(Projection p) const;
  float weight(index_t route) const { return weight_[static_cast<std::size_t>(route)]; }

  // Bytes of weights that a task keeps in its L2 cache: half of it at most.
  index_t cache_part() const {
    return std::min(static_cast<index_t>(lease_.l2_bytes()) / 2, kMostCacheBytes);
  }

  Runtime::Lease lease_;
  Call call_;
  int threads_;
  const ExpertWeights& experts_;
  const LayerInputs& inputs_;
  const ActivationKernels& activation_;
  Routing routing_;
  bool whole_;  // every expert is computed by its home shard alone, as if there were one shard
  std::vector<Portion> shards_;      // those that have some of the intermediate dimension
  std::vector<Block> blocks_;        // every route once a shard, experts in order
  index_t most_rows_ = 0;            // of a block
  std::vector<float> weight_;        // routing weight of every route
  std::array<ByBlock, 3> low_rank_;  // P' of each projection with LoRA
  ByBlock weighted_low_rank_;        // P' of down times the routing weights; none where it is not kept
  ByBlock hidden_;                   // h
  ByBlock saved_gate_, saved_up_;    // G and U; none where they are not kept
  TaskList tasks_;
  std::vector<const Group*> gate_up_done_;  // a block each

 private:
  // A lane for each place; or if every block is computed at one alone, for each team.
  struct Lane;
  std::vector<Lane> lanes() const;
  std::vector<Lane> lanes_of_teams() const;

  // The steps of add_sum, for a slice of the result: the rows of all routes; their sums, or the parts of each
  // place, and what these add up to.
  struct Sum;
  void take_memory(Sum& sum);
  void add_products(const std::shared_ptr<Sum>& sum, std::size_t slice);
  void add_sums(const std::shared_ptr<Sum>& sum, std::size_t slice);
  void add_parts(const std::shared_ptr<Sum>& sum, std::size_t slice);
  void add_merges(const std::shared_ptr<Sum>& sum, std::size_t slice);
  void multiply_slice(const Sum& sum, const Siblings& blocks, Range slice, float* rows, Arena& scratch) const;
  // The sum of a token's routes in a lane's rows, or in those of all lanes, where each has its own.
  void sum_routes(const Sum& sum, std::size_t slice, std::size_t lane, index_t token, float* total,
                  Arena& scratch) const;
  // What a team reads to add up the routes of some tokens.
  Work rows_read(const Sum& sum, std::size_t slice, Range tokens, std::size_t team) const;
  std::span<const std::int32_t> routes_of(Range tokens) const;
  // Adds for every team tasks body(team, tokens, scratch), for its share of all tokens; appends their groups.
  using TokenBody = std::function<void(std::size_t team, Range tokens, Arena& scratch)>;
  void add_by_token(const TokenBody& body, std::vector<const Group*>& groups);
  void wait(const std::vector<const Group*>& groups, Arena& scratch) const {
    for (const Group* group : groups) tasks_.wait(group, scratch);
  }

  Routing find_routes();
  void add_blocks();
  void add_siblings(Block block);
  void gate_up(Block block, Range slice, Range next, const ForwardInput& in, Arena& scratch) const;

  std::vector<ForwardInput> hidden_states_;  // a block each
};

}  // namespace kt
