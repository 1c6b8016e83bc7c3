#include "moe/schedule.h"

namespace kt {

namespace {

using Groups = TaskGraph::Groups;

// Of the groups of all blocks, those of the blocks that read what `packer` packed (kNone: none).
Groups of_readers(const Plan& plan, std::size_t packer, const Groups& groups) {
  Groups found;
  if (packer != PackSchedule::kNone)
    for_readers(plan, packer, [&](const Block& block) { found.push_back(groups[block.index]); });
  return found;
}

const TaskGraph::Group* add_packing(Pass& pass, const PackedProducts& products, const Block& block,
                                    char* slot, Groups emptied, const Groups& packed) {
  const auto* own = pass.tasks.add(
      pass.label(Stage::dispatch, block), block.node, 1, std::move(emptied),
      [&pass, &block, slot, pack = products.pack](index_t, Arena& scratch) {
        pack(pass, block, slot, scratch);
      },
      [&pass, &block](index_t) { return cost_of_packing(pass, block); });
  if (products.pack_p_or_q == nullptr || pass.plan.is_root(block)) return own;
  return pass.tasks.add(
      pass.label(Stage::dispatch, block), block.node, 1, Groups{own, packed[pass.plan.root(block).index]},
      [&pass, &block, slot, pack = products.pack_p_or_q](index_t, Arena&) { pack(pass, block, slot); });
}

const TaskGraph::Group* add_products(Pass& pass, const PackedProducts& products, const Block& block,
                                     Groups after) {
  const NcRanges& ranges = products.ranges[block.shard];
  const index_t per_task = pass.plan.ranges_per_task(ranges);
  return pass.tasks.add(
      pass.label(products.stage, block), block.node, ceil_div(ranges.count, per_task), std::move(after),
      [&pass, &block, &ranges, per_task, multiply = products.multiply](index_t task, Arena& scratch) {
        for_nc_ranges(ranges, task, per_task, [&](index_t i, Range nc, Range next) {
          const Arena::Frame frame(scratch);
          multiply(pass, block, i, nc, next, scratch);
        });
      },
      [&pass, &block, &ranges, per_task, cost = products.cost](index_t task) {
        return cost(pass, block, nc_of_task(ranges, task, per_task));
      });
}

constexpr index_t kBf16 = sizeof(bf16_t), kFloat = sizeof(float);

// `width` rows or columns of a weight, with their part of its scales.
index_t weight_bytes(const WeightBlock& all, index_t width, index_t k) {
  return all.weight->bytes() * width * k / (all.weight->rows * all.weight->cols);
}

// The product of a block's rows with `width` rows or columns of W, `k` long, and with LoRA's if it is here.
Work cost_of_product(const Pass& pass, Projection p, const Block& block, index_t width, index_t k,
                     bool here) {
  const index_t rank = here ? pass.rank(p) : 0;
  return {2 * block.count * width * (k + rank), weight_bytes(pass.weight(p, block), width, k), 0};
}

}  // namespace

Groups add_packed_products(Pass& pass, const PackedProducts& products, const Groups& ready) {
  const Plan& plan = pass.plan;
  const PackSchedule schedule(plan);
  std::vector<char*> rings;  // by node
  for (std::size_t node = 0; node < schedule.slots.size(); ++node)
    rings.push_back(pass.lease.arena(node).take<char>(schedule.slots[node] * products.slot_bytes));
  Groups packed(plan.blocks.size()), done(plan.blocks.size());  // by block
  for (const PackSchedule::Action& action : schedule.actions) {
    const Block& block = plan.blocks[action.block];
    if (action.packs) {
      packed[block.index] =
          add_packing(pass, products, block, rings[block.node] + action.slot * products.slot_bytes,
                      of_readers(plan, action.emptied, done), packed);
    } else {
      Groups after{packed[block.packer]};
      if (!ready.empty()) after.push_back(ready[block.index]);
      done[block.index] = add_products(pass, products, block, std::move(after));
    }
  }
  return done;
}

Groups add_shard_sums(Pass& pass, const ShardSums& sums, const Groups& ready) {
  const Plan& plan = pass.plan;
  const bool sharded = plan.shards.size() > 1;
  Groups done(plan.blocks.size());
  std::vector<const float*> products(plan.shards.size());  // of a token block, by shard
  for (const Block& block : plan.blocks) {
    const index_t n = sums.floats(pass, block);
    float* own = sharded ? pass.arena(block).take<float>(n) : nullptr;
    products[block.shard] = own;
    done[block.index] = pass.tasks.add(pass.label(sums.stage, block), block.node, 1, ready[block.index],
                                       [=, &pass, &block](index_t, Arena& scratch) {
                                         float* product = sharded ? own : scratch.take<float>(n);
                                         sums.multiply(pass, block, product, scratch);
                                         if (!sharded) sums.finish(pass, block, product, scratch);
                                       });
    const std::span<const Block> token_block = plan.token_block(block);
    if (!sharded || n == 0 || &block != &token_block.back()) continue;
    Groups partial;
    for (const Block& shard : token_block) partial.push_back(done[shard.index]);
    const Block& root = token_block.front();
    done[root.index] =
        pass.tasks.add(pass.label(Stage::reduce, root), root.node, 1, std::move(partial),
                       [=, &pass, &root](index_t, Arena& scratch) {
                         const std::vector<float> once(products.size(), 1.0f);
                         auto* sum = scratch.take<float>(n);
                         pass.kernels().epilogue.sum_scaled(to_int(n), to_int(std::ssize(products)),
                                                            products.data(), once.data(), sum);
                         sums.finish(pass, root, sum, scratch);
                       });
  }
  return done;
}

Work cost_of_packing(const Pass& pass, const Block& block) {
  return moved(block.count * pass.experts.hidden * kBf16, 0, block.node);
}

Work cost_of_gate_up(const Pass& pass, const Block& block, Range nc) {
  const index_t matrix = block.count * nc.size() * kBf16;
  Work work{0, matrix, 0};                                                                        // h
  if (!pass.up.empty()) work += moved(std::ssize(pass.x_projections()) * matrix, 0, block.node);  // G, U
  for (const Projection p : pass.x_projections())
    work += cost_of_product(pass, p, block, nc.size(), pass.cols(p, block),
                            /*here=*/true);
  return work;
}

Work cost_of_down(const Pass& pass, std::span<const Block> blocks, Range nc) {
  Work work{0, blocks.front().count * nc.size() * kFloat, 0};
  for (const Block& block : blocks)
    work += cost_of_product(pass, Projection::down, block, nc.size(), pass.cols(Projection::down, block),
                            pass.plan.is_root(block));
  return work;
}

Work cost_of_grad_down(const Pass& pass, const Block& block, Range nc) {
  const index_t matrix = block.count * nc.size() * kBf16;
  const index_t inner = std::ssize(pass.x_projections()) * matrix;  // G, U; and so many dG, dU
  Work work{0, inner + matrix, 0};                                  // and h
  work += moved(inner, pass.recompute ? block.node : 0, block.node);
  work += cost_of_product(pass, Projection::down, block, nc.size(), pass.rows(Projection::down, block), true);
  return work;
}

Work cost_of_grad_gate_up(const Pass& pass, std::span<const Block> blocks, Range nc) {
  Work work{0, blocks.front().count * nc.size() * kFloat, 0};
  for (const Block& block : blocks)
    for (const Projection p : pass.x_projections())
      work += cost_of_product(pass, p, block, nc.size(), pass.rows(p, block), pass.plan.is_root(block));
  return work;
}

}  // namespace kt
