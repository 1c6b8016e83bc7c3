// How tasks of all blocks are ordered, for the two shapes that they have besides combine.h's: a schedule only
// names the verbs that its tasks call. And what tasks cost, from the plan, for the profile: FLOPs of
// products, and bytes that a task has to read or write, caches aside.
#pragma once

#include <span>

#include "moe/pass.h"

namespace kt {

// Products with an input that is packed once for all NC ranges of the weights, such as X or dOut: packing
// runs some blocks ahead, through a ring of slots.
struct PackedProducts {
  Stage stage;
  // The packing of a block's input into a slot, by the first of its shards on each node; the root also
  // computes P or Q of the input, which `pack_p_or_q` then packs into the slots of other nodes. Null:
  // there is no LoRA.
  void (*pack)(Pass& pass, const Block& block, char* slot, Arena& scratch);
  void (*pack_p_or_q)(Pass& pass, const Block& block, char* slot);
  index_t slot_bytes;
  // The product with NC range `i` of the weights, after which range `next` is multiplied.
  void (*multiply)(const Pass& pass, const Block& block, index_t i, Range nc, Range next, Arena& scratch);
  Work (*cost)(const Pass& pass, const Block& block, Range nc);
  const std::vector<NcRanges>& ranges;  // by shard; they outlive the run
};
// `ready`: what the products of each block wait for besides; or empty. By block: the tasks of its products.
TaskGraph::Groups add_packed_products(Pass& pass, const PackedProducts& products,
                                      const TaskGraph::Groups& ready);

// fp32 products that are partial sums over the intermediate dimension, such as h Ad': of each shard of a
// token block, added up in order, and rounded by the root. One shard needs no sum.
struct ShardSums {
  Stage stage;
  index_t (*floats)(const Pass& pass,
                    const Block& block);  // 0: there is nothing to add up
  void (*multiply)(Pass& pass, const Block& block, float* product, Arena& scratch);
  void (*finish)(Pass& pass, const Block& block, float* sum, Arena& scratch);
};
// `ready`: what each block waits for. By block: the last of its tasks, which for the root finishes the sum.
TaskGraph::Groups add_shard_sums(Pass& pass, const ShardSums& sums, const TaskGraph::Groups& ready);

// Bytes in the memory of one node that another one reads or writes.
inline Work moved(index_t bytes, std::size_t memory, std::size_t node) {
  return memory == node ? Work{0, bytes, 0} : Work{0, 0, bytes};
}

// A product of a block's rows with n x rank numbers of LoRA.
inline Work cost_of_shrink(const Block& block, index_t rank, index_t n) {
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
