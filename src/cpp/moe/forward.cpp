// The forward pass of a layer, for each token block X of an expert (src/cpp/README.md has the formulas):
//     P = s X A',  G = X Wg' + Pg Bg' + bg,  U = X Wu' + Pu Bu' + bu,  h = act(G, U)
//     Pd = s h Ad',  out[t] += w (h Wd' + Pd Bd' + bd)
// First the verbs, which compute on one block and know nothing of tasks; then the tasks that name them.
#include <algorithm>

#include "moe/combine.h"
#include "moe/cost.h"
#include "moe/linear.h"
#include "moe/lora.h"

namespace kt {

namespace {

using Groups = TaskGraph::Groups;

// Bytes of the packed input of some projections, `cols` wide, and of its P.
index_t packed_input_bytes(const Pass& pass, std::span<const Projection> targets, index_t rows,
                           index_t cols) {
  index_t bytes = packed_b_bytes(pass.kernels(), rows, cols);
  for (const Projection p : targets) bytes += packed_b_bytes(pass.kernels(), rows, pass.rank(p));
  return bytes;
}

// ---- The verbs

// X of a block, packed. Returns what is behind it in memory.
char* pack_x(Pass& pass, const Block& block, char* into) {
  const index_t hidden = pass.experts.hidden;
  if (!pass.plan.small_m(block))
    pass.packed_x[block.index].rows =
        pack_b_cols_into(into, pass.kernels(), pass.input(Projection::gate, block, {0, hidden}));
  return into + packed_b_bytes(pass.kernels(), block.count, hidden);
}

// P = s X A' of gate and up.
void shrink_x(Pass& pass, const Block& block, Arena& scratch) {
  for (const Projection p : kGateUp) {
    if (!pass.lora(p)) continue;
    const Arena::Frame frame(scratch);
    auto* product = scratch.take<float>(p_product_floats(pass, p, block));
    multiply_a(pass, p, block, pass.packed_x[block.index].rows, product, scratch);
    round_p(pass, p, block, product);
  }
}

void pack_p_of_x(Pass& pass, const Block& block, char* into) {
  for (const Projection p : kGateUp) {
    if (!pass.lora(p)) continue;
    pass.packed_x[block.index].low_rank[index_of(p)] = pack_p(pass, p, block, into);
    into += packed_b_bytes(pass.kernels(), block.count, pass.rank(p));
  }
}

// h = act(G, U) of an MC range, columns nc; G and U are kept where backward wants them.
void activate(const Pass& pass, const Block& mc, Range nc, const std::array<float*, 2>& gate_up,
              Arena& scratch) {
  const Arena::Frame frame(scratch);
  const Span span(pass.recorder(scratch), Stage::activation);
  const index_t width = nc.size();
  const bool saved = !pass.gate.empty();
  // Off a line, for what fills lines may go past the caches.
  auto* unsaved = scratch.take<bf16_t>(width + 1) + 1;
  for (index_t i = 0; i < mc.count; ++i) {
    const index_t at = (pass.plan.within(mc).begin + i) * pass.plan.width(mc) + nc.begin;
    pass.activation.forward(to_int(width), gate_up[0] + i * width, gate_up[1] + i * width,
                            saved ? pass.gate[mc.index] + at : unsaved,
                            saved ? pass.up[mc.index] + at : unsaved, pass.h[mc.index] + at);
  }
}

// G = X Wg' + Pg Bg' + bg, U likewise, and h, columns nc.
void gate_up(const Pass& pass, const Block& block, Range nc, Range next, Arena& scratch) {
  const PackedInput& x = pass.packed_x[block.packer];
  std::array<ForwardWeights, 2> weights;
  std::array<float*, 2> result;
  for (const Projection p : kGateUp) {
    weights[index_of(p)] = forward_weights(pass, p, block, x, nc, next, scratch);
    result[index_of(p)] = scratch.take<float>(pass.kernels().gemm.nr * nc.size());
  }
  pass.plan.for_forward_mc_ranges(block, [&](const Block& mc) {
    for (const Projection p : kGateUp)
      multiply_forward(pass, p, {&weights[index_of(p)], 1}, mc, result[index_of(p)], nc.size(), scratch);
    activate(pass, mc, nc, result, scratch);
  });
}

// h of a block, packed. Returns what is behind it in memory.
char* pack_h(Pass& pass, const Block& block, char* into) {
  const index_t width = pass.plan.width(block);
  if (!pass.plan.small_m(block))
    pass.packed_h[block.index].rows =
        pack_b_cols_into(into, pass.kernels(), pass.input(Projection::down, block, {0, width}));
  return into + packed_b_bytes(pass.kernels(), block.count, width);
}

// h Wd' + Pd Bd' + bd, columns nc, summed over the shards that are here.
void down(const Pass& pass, std::span<const Block> blocks, Range nc, Range next, float* rows, index_t stride,
          Arena& scratch) {
  std::vector<ForwardWeights> weights;
  for (const Block& block : blocks)
    weights.push_back(
        forward_weights(pass, Projection::down, block, pass.packed_h[block.index], nc, next, scratch));
  pass.plan.for_forward_mc_ranges(blocks.front(), [&](const Block& mc) {
    multiply_forward(pass, Projection::down, weights, mc, rows + pass.plan.within(mc).begin * stride, stride,
                     scratch);
  });
}

// ---- The tasks

void add_down(Pass& pass, Combine& combine) {
  for (std::size_t c = 0; c < combine.steps(); ++c) {
    for (std::size_t l = 0; c < combine.chunks() && l < combine.partials().size(); ++l) {
      const Partial& partial = combine.partials()[l];
      combine.set_products(
          c, pass.tasks.add(
                 {Stage::down, {partial.shard}}, partial.team, std::ssize(partial.products),
                 combine.before_products(c, l),
                 [&, c, l](index_t task, Arena& scratch) {
                   const std::vector<Block>& blocks = partial.products[static_cast<std::size_t>(task)];
                   float* rows = combine.row(c, l, blocks.front().first);
                   combine.for_chunk_nc_ranges(c, blocks.front(), [&](Range nc, Range next, index_t offset) {
                     const Arena::Frame frame(scratch);
                     down(pass, blocks, nc, next, rows + offset, combine.stride(), scratch);
                   });
                 },
                 [&, c](index_t task) {
                   return cost_of_down(pass, partial.products[static_cast<std::size_t>(task)],
                                       combine.chunk(c));
                 }));
    }
    combine.add_sums(c);
  }
}

}  // namespace

Groups add_gate_up(Pass& pass) {
  const Plan& plan = pass.plan;
  const KernelSet& kernels = pass.kernels();
  std::vector<NcRanges> ranges;  // by shard
  for (const ShardSlice& shard : plan.shards)
    ranges.push_back(plan.nc_ranges(shard.range.size(), kernels.gemm.mr,
                                    2 * pass.experts.hidden * kernels.gemm.element_bytes));
  const PackSchedule schedule(plan);
  const index_t slot_bytes = packed_input_bytes(pass, kGateUp, plan.most_rows, pass.experts.hidden);
  const std::vector<char*> rings = pass.take_rings(schedule, slot_bytes);
  const bool lora = pass.lora(Projection::gate) || pass.lora(Projection::up);
  pass.packed_x.resize(plan.blocks.size());
  Groups packed(plan.blocks.size()), done(plan.blocks.size());  // by block
  for (const PackSchedule::Step& step : schedule.steps) {
    const Block& block = plan.blocks[step.block];
    if (step.packs) {
      char* slot = rings[block.team] + step.slot * slot_bytes;
      packed[block.index] = pass.tasks.add(
          pass.label(Stage::gather, block), block.team, 1, of_readers(plan, step.emptied, done),
          [&pass, &block, slot](index_t, Arena& scratch) {
            char* behind = pack_x(pass, block, slot);
            if (!pass.plan.is_root(block)) return;
            shrink_x(pass, block, scratch);
            pack_p_of_x(pass, block, behind);
          },
          [&](index_t) { return cost_of_packing(pass, block); });
      if (lora && !plan.is_root(block))
        packed[block.index] = pass.tasks.add(
            pass.label(Stage::gather, block), block.team, 1,
            Groups{packed[block.index], packed[plan.root(block).index]},
            [&pass, &block, behind = slot + packed_b_bytes(kernels, block.count, pass.experts.hidden)](
                index_t, Arena&) { pack_p_of_x(pass, block, behind); });
    } else {
      const NcRanges cut = ranges[block.shard];
      const index_t per_task = plan.ranges_per_task(cut);
      done[block.index] = pass.tasks.add(
          pass.label(Stage::gate_up, block), block.team, ceil_div(cut.count, per_task), packed[block.packer],
          [&pass, &block, cut, per_task](index_t task, Arena& scratch) {
            for_nc_ranges(cut, task, per_task, [&](index_t, Range nc, Range next) {
              const Arena::Frame frame(scratch);
              gate_up(pass, block, nc, next, scratch);
            });
          },
          [&pass, &block, cut, per_task](index_t task) {
            return cost_of_gate_up(pass, block, nc_of_task(cut, task, per_task));
          });
    }
  }
  return done;
}

Groups add_down_low_rank(Pass& pass, const Groups& h_done, bool pack) {
  constexpr Projection down = Projection::down;
  const Plan& plan = pass.plan;
  const bool lora{pass.lora(down)}, sharded = plan.shards.size() > 1;
  if (!pack && !lora) return h_done;
  if (pack) pass.packed_h.resize(plan.blocks.size());
  std::vector<char*> into(plan.blocks.size());       // by block: the packed h, and P behind it
  std::vector<float*> products(plan.blocks.size());  // by block: the partial sums of shards
  for (const Block& block : plan.blocks) {
    if (pack)
      into[block.index] =
          pass.memory(block).take<char>(packed_input_bytes(pass, kDown, block.count, plan.width(block)));
    if (sharded && lora)
      products[block.index] = pass.memory(block).take<float>(p_product_floats(pass, down, block));
  }
  const auto finish_p = [&pass, into, pack](const Block& block, float* product) {
    round_p(pass, down, block, product);
    if (!pack) return;
    char* behind = into[block.index] + packed_b_bytes(pass.kernels(), block.count, pass.plan.width(block));
    pass.packed_h[block.index].low_rank[index_of(down)] = pack_p(pass, down, block, behind);
  };
  Groups done(plan.blocks.size());
  for (const Block& block : plan.blocks)
    done[block.index] = pass.tasks.add(
        pass.label(Stage::hidden, block), block.team, 1, h_done[block.index],
        [=, &pass, &block, h = into[block.index], partial = products[block.index]](index_t, Arena& scratch) {
          if (pack) pack_h(pass, block, h);
          if (!lora) return;
          float* product = sharded ? partial : scratch.take<float>(p_product_floats(pass, down, block));
          const PackedB packed = pack ? pass.packed_h[block.index].rows : PackedB{};
          multiply_a(pass, down, block, packed, product, scratch);
          if (!sharded) finish_p(block, product);
        });
  if (!sharded || !lora) return done;
  for (const Block& block : plan.blocks)
    if (plan.is_root(block))
      done[block.index] = pass.tasks.add(
          pass.label(Stage::merge, block), block.team, 1, of_token_block(plan, block, done),
          [=, &pass, &block](index_t, Arena& scratch) {
            finish_p(block,
                     sum_over_shards(pass, block, products, p_product_floats(pass, down, block), scratch));
          });
  return done;
}

void forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
             Result out) {
  Pass pass(runtime, experts, inputs, Direction::forward);
  pass.gate = pass.saved_inner(saved.gate), pass.up = pass.saved_inner(saved.up);
  pass.h = pass.take_inner();
  for (const Projection p : kGateUp) {
    bf16_t* kept = saved.low_rank[index_of(p)];
    pass.lora_p[index_of(p)] = saved ? pass.saved_low_rank(p, kept) : pass.take_low_rank(p);
  }
  pass.lora_p[index_of(Projection::down)] = pass.take_low_rank(Projection::down);
  pass.weighted_lora_p = pass.saved_low_rank(Projection::down, saved.low_rank[index_of(Projection::down)]);

  const Groups h_done = add_gate_up(pass);
  const Groups packed = add_down_low_rank(pass, h_done, /*pack=*/true);
  const GemmKernels& gemm = pass.kernels().gemm;
  Combine combine(pass, out, /*weighted=*/true, gemm.mr, gemm.element_bytes, packed);
  add_down(pass, combine);
  pass.run();
  for (int e = 0; experts.routed != nullptr && e < experts.num_experts; ++e)
    experts.routed[e] += pass.routing.count(e);
}

}  // namespace kt
