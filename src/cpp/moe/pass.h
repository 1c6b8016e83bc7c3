// A pass: one forward or backward of a layer. Its plan, its matrices with their shapes, its tasks, and where
// the operands of products lie. forward.cpp and backward.cpp have the mathematics.
#pragma once

#include <array>
#include <vector>

#include "gemm/gemm.h"
#include "moe/layer.h"
#include "moe/plan.h"
#include "moe/routing.h"
#include "moe/task_graph.h"

namespace kt {

// The longest sum of products: the gradient of the hidden states, over gate and up of all shards, and LoRA.
static_assert(2 * kMostShards + 2 <= kMostTerms);

// A matrix of each block, by the block's index; empty: there is none of any block.
using ByBlock = std::vector<bf16_t*>;

// The input of a forward product, packed once for all NC ranges of the weights; nothing of a block of few
// rows.
struct PackedInput {
  PackedB rows;                     // X or h
  std::array<PackedB, 3> low_rank;  // P of the projections that read these rows
};

// The gradient of a projection's output, packed for backward products likewise.
struct PackedGradient {
  PackedA rows, low_rank;  // dOutput and Q
};

struct Pass {
  Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, Direction direction);

  const KernelSet& kernels() const { return lease.kernels(); }
  const LoraPair& lora(Projection p) const { return inputs.of(p); }
  index_t rank(Projection p) const { return inputs.of(p).rank(); }
  // s: dropped inputs are zeros, and the kept ones' factor 1 / (1 - probability) enters here, in fp32.
  float lora_scale(Projection p) const {
    return static_cast<float>(inputs.of(p).scaling / (1.0 - inputs.dropout.probability));
  }
  float route_weight(index_t route) const { return route_weights[static_cast<std::size_t>(route)]; }

  // Rows and columns of a projection on a block's shard, and the first of each in all of the projection.
  index_t rows(Projection p, const Block& block) const {
    return p == Projection::down ? experts.hidden : plan.width(block);
  }
  index_t cols(Projection p, const Block& block) const {
    return p == Projection::down ? plan.width(block) : experts.hidden;
  }
  index_t first_row(Projection p, const Block& block) const {
    return p == Projection::down ? 0 : plan.slice(block).begin;
  }
  index_t first_col(Projection p, const Block& block) const {
    return p == Projection::down ? plan.slice(block).begin : 0;
  }

  // W, A and B of a projection on a block's shard.
  WeightBlock weight(Projection p, const Block& block) const;
  MatView lora_a(Projection p, const Block& block) const;
  MatView lora_b(Projection p, const Block& block) const;

  // Some columns of a block's rows: in a [T, n] matrix; in the blocks' own [m, width]; the input of a
  // projection, X or h; and the gradient of its output, dOut, dG or dU.
  Rows by_token(const MatView& matrix, const Block& rows, Range cols) const;
  Rows by_route(const ByBlock& matrices, index_t width, const Block& rows, Range cols) const;
  Rows input(Projection p, const Block& rows, Range cols) const;
  Rows grad_output(Projection p, const Block& rows, Range cols) const;
  // P' or Q' of a block's rows: [r, count].
  MatView low_rank(const ByBlock& matrices, Projection p, const Block& rows) const;

  // Memory for a matrix of each block, on the block's node; and matrices that lie in the caller's memory, one
  // shard after the other. [m, width of the shard]; and [m, r] or [r, m], which the shards of a token block
  // have in common. Of a null matrix none.
  ByBlock take_inner();
  ByBlock saved_inner(bf16_t* matrix) const;
  ByBlock take_low_rank(Projection p);
  ByBlock saved_low_rank(Projection p, bf16_t* matrix) const;
  Arena& memory(const Block& block) { return lease.memory(block.team); }
  // A ring of slots of `bytes` for each team.
  std::vector<char*> take_rings(const PackSchedule& schedule, index_t bytes);

  // One row of fp32 results, stored in the wanted type.
  void store(const float* row, index_t n, const Result& result, index_t offset) const;

  // How a profile calls the tasks of a block, and the time of a part of a task.
  Label label(Stage stage, const Block& block) const;
  Recorder* recorder(const Arena& scratch) const { return lease.recorder(scratch); }

  void run();

  Runtime::Lease lease;
  Call call;
  const ExpertWeights& experts;
  const LayerInputs& inputs;
  const ActivationKernels& activation;
  const Routing routing;
  const Plan plan;
  std::vector<float> route_weights;
  TaskGraph tasks;

  // m: the rows of a block, I_s: the columns of the intermediate dimension on its shard.
  ByBlock gate, up;               // G, U [m, I_s]; none where they are not kept
  ByBlock h;                      // h [m, I_s]
  std::array<ByBlock, 3> lora_p;  // P' [r, m] of each projection, one for all shards of a token block
  ByBlock weighted_lora_p;        // P' of down times the routing weights [r, m]; none where it is not kept
  std::vector<PackedInput> packed_x, packed_h;  // by the block that packed them

  // Of backward.
  MatView grad_out;                  // dOut [T, H]
  std::array<ByBlock, 2> d_gate_up;  // dG, dU [m, I_s]
  std::array<ByBlock, 3> lora_q,
      lora_q_transposed;  // Q [m, r]; Q' [r, m], that of down times the routing weights
  std::array<std::vector<PackedGradient>, 3> packed_grad;  // by the block that packed them

 private:
  Routing find_routes();
};

// From the groups of all blocks, those of a token block's shards; and of the blocks that read what `packer`
// packed (kNone: none).
TaskGraph::Groups of_token_block(const Plan& plan, const Block& block, const TaskGraph::Groups& groups);
TaskGraph::Groups of_readers(const Plan& plan, std::size_t packer, const TaskGraph::Groups& groups);

// The sum of n floats of every shard of a token block, shards in order; `products` are by block.
float* sum_over_shards(const Pass& pass, const Block& block, const std::vector<float*>& products, index_t n,
                       Arena& scratch);

// Adds the tasks of all blocks that compute P, G, U and h = act(G, U). By block: those that come last.
TaskGraph::Groups add_gate_up(Pass& pass);
// The same for P = s h A' of down; with `pack` also for h and P as the product with W reads them.
TaskGraph::Groups add_down_low_rank(Pass& pass, const TaskGraph::Groups& h_done, bool pack);

}  // namespace kt
