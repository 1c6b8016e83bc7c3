// What the forward and the backward pass of one call share: routing, blocks of routes, and the steps that
// backward repeats when it recomputes.
#pragma once

#include <functional>
#include <initializer_list>
#include <span>
#include <vector>

#include "base/split.h"
#include "gemm/gemm.h"
#include "moe/layer.h"
#include "moe/routing.h"

namespace kt {

// Routes that share one packing of an expert's weights; large enough to make the packing cheap.
inline constexpr index_t kBlockRows = 512;

// Consecutive routes of one expert.
struct Block {
  int expert;
  index_t first, count;
};

class Pass {
 public:
  Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs);

 protected:
  // The first LoRA products, scaled: low_rank[p] of a block is P' = s (X A')' [r, count], rounded to bf16. X
  // is read from hidden_states (gate, up) or from `hidden_` (down); with `weighted`, times the routing weight
  // too.
  void project_a(std::initializer_list<Projection> targets, bool weighted = false);

  // G, U = X W' + P B' and h = act(G) * U. `saved` may be null pointers.
  void gate_up(SavedGateUp saved);

  // The rows of a block in a [T, n] matrix, and in a [routes, n] one.
  Rows by_token(const MatView& matrix, Block block, Range cols) const;
  Rows by_route(const bf16_t* matrix, index_t row_length, Block block, Range cols) const;
  // The input of a projection's LoRA A, rows of a block, dropped elements zero.
  Rows lora_input(Projection p, Block block, Range cols, Arena& scratch) const;
  // These rows, or when dropout is on a copy of them with the dropped elements zero.
  Rows dropped(Rows rows, Projection p, Block block, Range cols, Arena& scratch) const;
  // P' or Q' of a part of a block: [r, count].
  MatView low_rank_of(const bf16_t* low_rank, index_t rank, Block whole, Block part) const;

  // The blocks of one expert, in order.
  std::span<const Block> blocks_of(int expert) const;

  // Columns `slice` of a [T, H] result, summed in fp32 over the experts in order: `add` adds what one
  // expert's routes give to sum [T, slice.size()]. The task that calls owns these columns.
  void sum_over_experts(Range slice, const Result& result, Arena& scratch,
                        const std::function<void(int expert, float* sum)>& add) const;

  // Cuts `block` into parts of at most `rows` routes.
  template <class Body>
  static void for_parts(Block block, index_t rows, const Body& body) {
    for (index_t i = 0; i < block.count; i += rows)
      body(Block{block.expert, block.first + i, std::min(rows, block.count - i)});
  }

  // Parts to cut n columns into: `bytes` of packed weights a column fill half the L2 cache, on whole tiles.
  index_t slices(index_t n, index_t tile, index_t bytes, index_t at_least = 1) const;
  index_t slices_per_thread(index_t n, index_t tile, index_t bytes) const;

  // One row of fp32 results, stored in the wanted type.
  void store(const float* row, index_t n, const Result& result, index_t offset) const;

  bf16_t* take_low_rank(Projection p) {
    return memory().take<bf16_t>(inputs_.of(p).rank() * routing_.routes());
  }
  Arena& memory() { return lease_.memory(); }
  const KernelSet& kernels() const { return lease_.kernels(); }
  float lora_scale(Projection p) const;

  Runtime::Lease lease_;
  int threads_;
  const ExpertWeights& experts_;
  const LayerInputs& inputs_;
  const ActivationKernels& activation_;
  Routing routing_;
  std::vector<Block> blocks_;          // every route once, experts in order
  std::vector<float> weight_;          // routing weight of every route
  std::array<bf16_t*, 3> low_rank_{};  // P' of each projection with LoRA
  bf16_t* hidden_ = nullptr;           // h, [routes, I]
};

}  // namespace kt
