// LoRA beside the frozen weights: the low-rank intermediates P = s X A' and Q = s dOutput B, the gradients of
// A and B, and dropout of the input of A.
#pragma once

#include "moe/pass.h"

namespace kt {

// Zeroes the dropped ones among the inputs [col, col + n) of a projection's LoRA A product for one routed
// token (its slot in topk_ids). No mask is stored: whether an element is dropped is a function of its place
// and the seed, so backward sees the mask of forward, whatever the threads and blocks.
void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, bf16_t* row);
void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, float* row);

// P of a block takes three steps, so that shards can be summed in between: the product A X', fp32
// [r, min_ldc(m)], from the packed rows (none: from the rows themselves); P' [r, m] of it, scaled and
// rounded, and that of down also times the routing weights, to where there is memory; and its packing.
index_t p_product_floats(const Pass& pass, Projection p, const Block& block);
void multiply_a(const Pass& pass, Projection p, const Block& block, PackedB packed, float* product,
                Arena& scratch);
void round_p(const Pass& pass, Projection p, const Block& block, float* product);
PackedB pack_p(const Pass& pass, Projection p, const Block& block, char* into);

// Q of a block likewise: the product dOutput B, fp32 [m, min_ldc(r)]; Q [m, r] for the gradient of the
// input, and Q' [r, m] for that of A, which for down has the routing weights; and the packing of Q.
index_t q_product_floats(const Pass& pass, Projection p, const Block& block);
void multiply_b(const Pass& pass, Projection p, const Block& block, float* product, Arena& scratch);
void round_q(const Pass& pass, Projection p, const Block& block, float* product, Arena& scratch);
PackedA pack_q(const Pass& pass, Projection p, const Block& block, char* into);

// Adds the tasks that compute dA = Q' X and dB' = P' dOutput of every expert that has tokens, each summed
// over the expert's blocks in order, and those that clear the gradients of the others. By block, `ready` is
// what dG, dU, P and Q are written by.
void add_lora_gradients(Pass& pass, const LayerGradients& gradients, const TaskGraph::Groups& ready);

}  // namespace kt
