// The backward pass of one call. backward.cpp has its steps, backward_lora.cpp those that only LoRA needs.
#pragma once

#include "moe/pass.h"

namespace kt {

class Backward : Pass {
 public:
  Backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const MatView& grad_out,
           const LayerGradients& gradients)
      : Pass(runtime, experts, inputs, Direction::backward), grad_out_(grad_out), gradients_(gradients) {}

  void run(const Saved& saved);

 private:
  // Q = s dOutput B of a route: by rows for the gradient of the input, transposed for that of A. The routing
  // weight of the down projection belongs in the second alone: dh' is wanted without it.
  struct LowRankGradient {
    ByBlock rows, transposed;
  };

  // The gradient of a projection's output, a block's rows: packed once for all slices of the weights. Nothing
  // where the rows are few.
  struct GradInput {
    PackedA rows, low_rank;  // dOutput and Q
  };

  // W or LoRA A of a projection, some columns: as right operand, unless the block has few rows.
  struct BackwardTerm {
    Block block;
    Projection projection;
    bool lora;
    WeightBlock weights;  // W
    Rows rows;            // LoRA A
    PackedB packed;
    MatView next;  // weights that this task needs next
  };
  using BackwardWeights = std::vector<BackwardTerm>;  // of every block, W of some projections, then LoRA A

  // A gradient of LoRA A or B of one expert, some of its columns (A) or rows (B). One that is cut among
  // shards is computed from a shard's own blocks, the others from those at home.
  struct LoraJob {
    int expert;
    Projection projection;
    bool of_b;
    Range slice;
    std::vector<std::size_t> blocks;
  };

  // Adds the tasks that compute P of down again, from the h that forward had.
  void add_down_low_rank();
  // dh' = dY Wd + Q Ad, then dG, dU, h and <dh', h> from it and the saved G, U.
  void add_down();
  // dots: [ceil(slice / dot_cols), routes], one for every `dot_cols` columns of the slice.
  void down(Block block, Range slice, Range next, float* dots, index_t dot_cols, Arena& scratch) const;
  // <dY, bd> of a block's routes: what the bias of down adds to the gradient of their weights.
  void bias_dots(Block block, float* dots, Arena& scratch) const;
  // The gradient of a routing weight, its `count` dots added in order; 0 where there is no route.
  void sum_dots(const float* dots, index_t count) const;
  // Packs dG and dU, and computes their Q.
  void add_gate_up_gradients();
  // dX[token] += dG Wg + dU Wu + Qg Ag + Qu Au.
  void add_hidden_states();

  // The gradient of a projection's output, rows of a block.
  Rows grad_output(Projection p, Block block, Range cols) const;
  // Packs it, and Q of it, into memory for both that is grad_input_bytes long.
  void pack_grad_rows(Projection p, Block block, char* into);
  void pack_grad_low_rank(Projection p, Block block, char* into);
  index_t grad_input_bytes(Projection p, Block block) const;

  void add_weights(std::span<const Projection> targets, Block block, Range slice, Range next,
                   BackwardWeights& weights, Arena& scratch) const;
  // The gradient of the projections' common input, columns `slice`: dOutput W and Q A of each, one fp32 sum.
  void input_gradient(const BackwardWeights& weights, Block part, Range slice, float* result, index_t stride,
                      Arena& scratch) const;
  // result [part.count, ...] = sum of dOutput W and Q A over the given weights.
  void multiply_backward(std::span<const BackwardTerm> weights, Block part, float* result, index_t stride,
                         Arena& scratch) const;

  // dOutput B of a block, [count, result_stride(r)], from the packed gradient of the output.
  void multiply_b(Projection p, Block block, float* product, Arena& scratch) const;
  // Q of it.
  void keep_grad_low_rank(Projection p, Block block, float* product, Arena& scratch);
  index_t grad_product_floats(Projection p, Block block) const {
    return block.count * result_stride(kernels(), inputs_.of(p).rank());
  }

  // Adds the tasks that compute the gradients of LoRA A and B.
  void add_lora();
  void add_lora_jobs(int expert, Projection p, bool of_b);
  // dA = Q' X and dB' = P' dOutput, summed over the expert's routes in order.
  void lora(const LoraJob& job, Arena& scratch) const;
  // The gradients of an idle expert: zero.
  void clear_lora(index_t expert) const;

  // P as the gradient of B wants it.
  const ByBlock& output_low_rank(Projection p) const {
    return p == Projection::down ? weighted_low_rank_ : low_rank_[index_of(p)];
  }
  index_t rows_per_part() const { return 4 * kernels().gemm.mr; }

  MatView grad_out_;
  const LayerGradients& gradients_;
  std::array<ByBlock, 2> grad_gate_up_;  // dG, dU
  std::array<LowRankGradient, 3> grad_low_rank_;
  std::array<std::vector<GradInput>, 3> grad_inputs_;  // a block each
  // A block each: what forward did not keep (empty if it did); dG and dU; their packed form and their Q.
  std::vector<const Group*> recomputed_, down_done_, gradients_done_;
};

}  // namespace kt
