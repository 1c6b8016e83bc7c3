// What the tasks of a pass compute and move, from the plan, for the profile: FLOPs of products, and bytes
// that a task has to read or write, caches aside.
#pragma once

#include <span>

#include "moe/pass.h"

namespace kt {

// Bytes in the memory of one node that another one reads or writes.
inline Work moved(index_t bytes, std::size_t memory, std::size_t node) {
  return memory == node ? Work{0, bytes, 0} : Work{0, 0, bytes};
}

// A product of a block's rows with n x rank numbers of LoRA.
inline Work cost_of_low_rank(const Block& block, index_t rank, index_t n) {
  return {2 * block.count * rank * n, 0, 0};
}

// The rows of hidden_states or grad_out that are packed.
Work cost_of_packing(const Pass& pass, const Block& block);
// G, U and h of some columns of the intermediate dimension.
Work cost_of_gate_up(const Pass& pass, const Block& block, Range nc);
// Rows of out, of some of its columns.
Work cost_of_down(const Pass& pass, std::span<const Block> blocks, Range nc);
// dh, dG and dU of some columns of the intermediate dimension.
Work cost_of_grad_down(const Pass& pass, const Block& block, Range nc);
// Rows of dX, of some of its columns.
Work cost_of_grad_gate_up(const Pass& pass, std::span<const Block> blocks, Range nc);

}  // namespace kt
