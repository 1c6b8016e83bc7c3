// A projection with LoRA as a linear map of some rows. Forward: X W' + P B' + b. Backward: dOutput W + Q A.
// Each is one sum of products whose fp32 tile is rounded once, when all of it is there.
#pragma once

#include <span>
#include <vector>

#include "moe/pass.h"

namespace kt {

// W, LoRA B and the bias of a projection for an NC range of its output: as left operands, unless the block
// is multiplied by GEMV; and the packed input that they multiply. Only the root has LoRA B and the bias of
// down.
struct ForwardWeights {
  Block block;
  const PackedInput* input;
  WeightBlock weights;
  Rows lora_b;
  const bf16_t* bias;  // null: none
  PackedA packed_weights, packed_lora_b;
  MatView next;  // the weights that this task needs next
  bool lora;
};
ForwardWeights forward_weights(const Pass& pass, Projection p, const Block& block, const PackedInput& input,
                               Range nc, Range next, Arena& scratch);

// result [mc.count, nc] = X W' + P B' + b of an MC range of at most nr rows, summed over the shards that have
// weights here. Its rows are `stride` floats apart.
void multiply_forward(const Pass& pass, Projection p, std::span<const ForwardWeights> weights,
                      const Block& mc, float* result, index_t stride, Arena& scratch);

// W or LoRA A of a projection, for an NC range of its input: as right operand, unless the block is multiplied
// by GEMV.
struct BackwardTerm {
  Block block;
  Projection projection;
  bool lora;
  WeightBlock weights;  // W
  Rows lora_a;
  PackedB packed;
  MatView next;  // the weights that this task needs next
};
using BackwardWeights = std::vector<BackwardTerm>;  // of every block W of its projections, then LoRA A
void add_backward_weights(const Pass& pass, std::span<const Projection> targets, const Block& block, Range nc,
                          Range next, BackwardWeights& weights, Arena& scratch);

// result [mc.count, nc] = the sum of dOutput W + Q A over the weights, which is the gradient of the input
// that the projections share. What dropout dropped gets none from LoRA.
void multiply_backward(const Pass& pass, const BackwardWeights& weights, const Block& mc, Range nc,
                       float* result, index_t stride, Arena& scratch);
// Rows of an MC range of a backward product.
inline index_t backward_mc(const Pass& pass) { return 4 * pass.kernels().gemm.mr; }

}  // namespace kt
