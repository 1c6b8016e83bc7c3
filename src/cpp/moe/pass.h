// A pass: one forward or backward of a layer. Its plan, its matrices with their shapes, its tasks, and where
// the operands of products lie. forward.cpp and backward.cpp have the mathematics.
#pragma once

#include <array>
#include <span>
#include <vector>

#include "gemm/gemm.h"
#include "moe/layer.h"
#include "moe/plan.h"
#include "moe/task_graph.h"

namespace kt {

// The longest sum of products: the gradient of the hidden states, over gate and up of all shards, and LoRA.
static_assert(2 * kMostShards + 2 <= kMostTerms);

// A matrix of each block, by the block's index; empty: there is none of any block.
using ByBlock = std::vector<bf16_t*>;

// The input of a forward product, packed once for all NC ranges of the weights; nothing of a block by
// GEMV.
struct PackedInput {
  char* panels = nullptr;         // of h and its P; X lies in a slot of a ring
  PackedB rows = {};              // X or h
  std::array<PackedB, 3> p = {};  // P of the projections that read these rows
};

// The gradient of a projection's output, packed for backward products likewise.
struct PackedGradient {
  char* panels = nullptr;     // of dG or dU and its Q; dOut lies in a slot of a ring
  PackedA rows = {}, q = {};  // dOutput and Q
};

// The gradients of the routing weights in the making: dots <dh, h> of all routed tokens, row after row.
// Every row has some columns of h; a shard's rows follow those of the shard before. With a bias of down, <dY,
// bd> is the last row.
struct Dots {
  float* rows = nullptr;
  index_t count = 0, routes = 0;
  std::vector<index_t> first_row = {};  // of each shard
  bool by_columns = false;              // a row for every kDotCols columns; else for every NC range
  bool biased = false;

  float* row(index_t i) const { return rows + i * routes; }
  float* of_bias() const { return row(count - 1); }
};

struct Pass {
  Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, Direction direction);

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
  ByBlock gate, up;  // G, U [m, I_s]; none where they are not kept, and no G without a gate
  ByBlock h;         // h [m, I_s]
  std::array<ByBlock, 3> p_transposed;  // P' [r, m] of each projection, one for all shards of a token block
  ByBlock weighted_p_transposed;  // P' of down times the routing weights [r, m]; none where it is not kept
  std::vector<NcRanges> gate_up_ranges, grad_down_ranges;  // by shard
  std::vector<PackedInput> packed_x, packed_h;             // by the block that packed them

  // Of backward.
  bool recompute = false;                    // forward kept nothing
  MatView grad_out;                          // dOut [T, H]
  std::array<ByBlock, 2> d_gate_up;          // dG, dU [m, I_s]; no dG without a gate
  std::array<ByBlock, 3> lora_q;             // Q [m, r]
  std::array<ByBlock, 3> lora_q_transposed;  // Q' [r, m], that of down times the routing weights
  Dots dots;
  std::array<std::vector<PackedGradient>, 3> packed_grad;  // by the block that packed them

  const KernelSet& kernels() const { return lease.kernels(); }
  // All projections that the experts have, and those that read hidden_states.
  std::span<const Projection> projections() const { return projections_of(experts.gated); }
  std::span<const Projection> x_projections() const { return x_projections_of(experts.gated); }
  const LoraPair& lora(Projection p) const { return inputs.of(p); }
  index_t rank(Projection p) const { return inputs.of(p).rank(); }
  // s. Dropped inputs are zeros, and the kept ones' factor 1 / (1 - probability) enters here, in fp32.
  float lora_scale(Projection p) const {
    return static_cast<float>(inputs.of(p).scaling / (1.0 - inputs.dropout.probability));
  }
  float route_weight(index_t route) const { return route_weights[to_size(route)]; }

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
  Rows by_token(const MatView& matrix, const BlockRows& rows, Range cols) const;
  Rows by_route(const ByBlock& matrices, index_t width, const BlockRows& rows, Range cols) const;
  Rows input(Projection p, const BlockRows& rows, Range cols) const;
  Rows grad_output(Projection p, const BlockRows& rows, Range cols) const;
  // P' or Q' of a block's rows: [r, count].
  MatView transposed_rows(const ByBlock& matrices, Projection p, const BlockRows& rows) const;

  // Memory for a matrix of each block, on the block's node; and matrices that lie in the caller's memory, one
  // shard after the other. [m, width of the shard]; and [m, r] or [r, m], which the shards of a token block
  // have in common. Of a null matrix none.
  ByBlock take_inner();
  ByBlock saved_inner(bf16_t* matrix) const;
  ByBlock take_p_or_q(Projection p);
  ByBlock saved_p(Projection p, bf16_t* matrix) const;
  Arena& arena(const Block& block) { return lease.arena(block.node); }
  // One row of fp32 results, stored in the wanted type.
  void store(const float* row, index_t n, const Result& result, index_t offset) const;

  // How a profile calls the tasks of a block, and the time of a part of a task.
  Label label(Stage stage, const Block& block) const;
  Recorder* recorder(const Arena& scratch) const { return lease.recorder(scratch); }

  void run();

 private:
  Routing find_routes();
};

// Adds the tasks of all blocks that compute P, G, U and h = act(G, U), of forward and where backward computes
// them again. By block: those that come last.
TaskGraph::Groups add_gate_up(Pass& pass);

}  // namespace kt
