// A projection with LoRA as a linear map of some rows. Forward: X W' + P B' + b. Backward: dOutput W + Q A.
// Each is one sum of products whose fp32 tile is rounded once, when all of it is there (linear.cpp). And what
// LoRA has of its own: P = s X A' and Q = s dOutput B, the gradients of A and B, and dropout of the input of
// A (lora.cpp).
#pragma once

#include <span>
#include <vector>

#include "moe/pass.h"

namespace kt {

// W, LoRA B and the bias of a projection for an NC range of its output: as left operands, unless the block is
// multiplied by GEMV; and the packed input that they multiply. Of down, LoRA B and the bias are the root's
// alone.
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

// result [mc.count(), nc] = X W' + P B' + b of an MC range of at most nr rows, summed over the shards that
// have weights here. Its rows are `stride` floats apart.
void multiply_forward(const Pass& pass, Projection p, std::span<const ForwardWeights> weights,
                      const BlockRows& mc, float* result, index_t stride, Arena& scratch);

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

// result [mc.count(), nc] = the sum of dOutput W + Q A over the weights, which is the gradient of the input
// that the projections share. What dropout dropped gets none from LoRA.
void multiply_backward(const Pass& pass, const BackwardWeights& weights, const BlockRows& mc, Range nc,
                       float* result, index_t stride, Arena& scratch);
// Rows of an MC range of a backward product.
inline index_t backward_mc(const Pass& pass) { return 4 * pass.kernels().gemm.mr; }

// Zeroes the dropped ones among the inputs [col, col + n) of a projection's LoRA A product for one routed
// token (its slot in topk_ids). No mask is stored: whether an element is dropped is a function of its place
// and the seed, so backward sees the mask of forward, whatever the threads and blocks.
void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, bf16_t* row);
void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, float* row);

// P of a block takes three steps, so that shards can be summed in between: the product A X', fp32
// [r, min_ldc(m)], from the packed rows (none: from the rows themselves); P' [r, m] of it, scaled and
// rounded, and that of down also times the routing weights, to where there is memory; and its packing, behind
// the input that some projections have in common, whose panels take packed_input_bytes with it.
index_t p_product_floats(const Pass& pass, Projection p, const Block& block);
index_t p_floats_of_down(const Pass& pass, const Block& block);
void multiply_p(const Pass& pass, Projection p, const Block& block, PackedB packed, float* product,
                Arena& scratch);
void round_p(const Pass& pass, Projection p, const Block& block, float* product);
index_t packed_input_bytes(const Pass& pass, std::span<const Projection> targets, index_t rows, index_t cols);
void pack_p(const Pass& pass, std::span<const Projection> targets, const Block& block, char* panels,
            PackedInput& input);

// Q of a block likewise: the product dOutput B, fp32 [m, min_ldc(r)]; Q [m, r] for the gradient of the
// input, and Q' [r, m] for that of A, which for down has the routing weights; and the packing of Q, behind
// the gradient of the output.
index_t q_product_floats(const Pass& pass, Projection p, const Block& block);
void multiply_q(const Pass& pass, Projection p, const Block& block, float* product, Arena& scratch);
void round_q(const Pass& pass, Projection p, const Block& block, float* product, Arena& scratch);
index_t packed_gradient_bytes(const Pass& pass, Projection p, index_t rows, index_t cols);
void pack_q(Pass& pass, Projection p, const Block& block, char* panels);

// Adds the tasks that compute dA = Q' input and dB' = P' dOutput, which is transposed at the end, of every
// expert that has tokens, each summed over the expert's blocks in order, and those that clear the gradients
// of the others. By block, `ready` is what dG, dU, P and Q are written by.
void add_lora_gradients(Pass& pass, const LayerGradients& gradients, const TaskGraph::Groups& ready);

}  // namespace kt
