// The backward pass of one call. backward.cpp has its steps, backward_lora.cpp those that only LoRA needs.
#pragma once

#include "moe/pass.h"

namespace kt {

class Backward : Pass {
 public:
  Backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const MatView& grad_out,
           const LayerGradients& gradients)
      : Pass(runtime, experts, inputs), grad_out_(grad_out), gradients_(gradients) {}

  void run(SavedGateUp saved);

 private:
  // Q = s dOutput B of a route: by rows for the gradient of the input, transposed for that of A. The routing
  // weight of the down projection belongs in the second alone: dh' is wanted without it.
  struct LowRankGradient {
    bf16_t *rows = nullptr, *transposed = nullptr;
  };

  // A of a projection with LoRA, a slice of its columns.
  struct LoraA {
    Projection projection;
    PackedB packed;
  };

  // A gradient of LoRA A or B of one expert, some of its columns (A) or rows (B).
  struct LoraJob {
    int expert;
    Projection projection;
    bool of_b;
    Range slice;
  };

  // The gradient of a projection's output, rows of a block.
  Rows grad_output(Projection p, Block block, Range cols) const;

  // dh' = dY Wd + Q Ad, then dG, dU, h and <dh', h> from it and the saved G, U.
  void down(SavedGateUp saved);
  // The gradient of a routing weight, its slices added in order; 0 where there is no route.
  void sum_dots(const float* dots, index_t parts) const;

  // The two last products of backward do not wait for each other: one loop over both kinds of task.
  void input_and_lora();
  // dX[token] += dG Wg + dU Wu + Qg Ag + Qu Au.
  void hidden_states(Range slice, Arena& scratch) const;
  void add_expert(int expert, Range slice, float* sum, Arena& scratch) const;

  std::vector<LoraA> pack_lora_a(std::initializer_list<Projection> targets, int expert, Range slice,
                                 Arena& scratch) const;
  // The gradient of some projections' input, columns `slice`: the base terms and Q A of each LoRA, one fp32
  // sum.
  void input_gradient(std::span<const Term> base, std::span<const LoraA> loras, Block part, Range slice,
                      float* result, Arena& scratch) const;

  void project_grad_b(std::initializer_list<Projection> targets);
  void store_low_rank(Projection p, Block block, Block part, float* product, index_t stride,
                      float* transposed, const LowRankGradient& q);
  std::vector<LoraJob> lora_jobs() const;
  // dA = Q' X and dB' = P' dOutput, summed over the expert's routes in order; zero for an idle expert.
  void lora(const LoraJob& job, Arena& scratch) const;

  index_t rows_per_part() const { return 4 * kernels().gemm.mr; }

  MatView grad_out_;
  const LayerGradients& gradients_;
  std::array<bf16_t*, 2> grad_gate_up_{};  // dG, dU, [routes, I]
  std::array<LowRankGradient, 3> grad_low_rank_{};
};

}  // namespace kt
