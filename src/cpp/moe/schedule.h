// How tasks of all blocks are ordered, for the two shapes that they have besides combine.h's. A schedule only
// names the verbs that its tasks call.
#pragma once

#include "moe/pass.h"

namespace kt {

// Products with an input that is packed once for all NC ranges of the weights, such as X or dOut: packing
// runs some blocks ahead, through a ring of slots.
struct PackedProducts {
  Stage stage;
  // The packing of a block's input into a slot, by the first of its shards on each node; the root also
  // computes the input's low rank, which `pack_low_rank` then packs into the slots of other nodes. Null:
  // there is no LoRA.
  void (*pack)(Pass& pass, const Block& block, char* slot, Arena& scratch);
  void (*pack_low_rank)(Pass& pass, const Block& block, char* slot);
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

}  // namespace kt
