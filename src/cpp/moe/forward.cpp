// The forward pass of a layer, for each token block X of an expert (src/cpp/README.md has the formulas):
//     P = s X A',  G = X Wg' + Pg Bg' + bg,  U = X Wu' + Pu Bu' + bu,  h = act(G, U)
//     Pd = s h Ad',  out[t] += w (h Wd' + Pd Bd' + bd)
// First the verbs, which compute on one block and know nothing of tasks; then the tasks that name them.
#include <algorithm>

#include "moe/combine.h"
#include "moe/linear.h"
#include "moe/schedule.h"

namespace kt {

namespace {

// ---- The verbs

// P of gate and up, packed behind the packed X.
void pack_p_of_x(Pass& pass, const Block& block, char* slot) {
  pack_p(pass, pass.x_projections(), block, slot, pass.packed_x[block.index]);
}

// X, packed, and P = s X A' of gate and up.
void pack_x(Pass& pass, const Block& block, char* slot, Arena& scratch) {
  PackedB& rows = pass.packed_x[block.index].rows;
  if (!by_gemv(block))
    rows =
        pack_b_cols_into(slot, pass.kernels(), pass.input(Projection::up, block, {0, pass.experts.hidden}));
  if (!pass.plan.is_root(block)) return;
  for (const Projection p : pass.x_projections()) {
    if (!pass.lora(p)) continue;
    const Arena::Frame frame(scratch);
    auto* product = scratch.take<float>(p_product_floats(pass, p, block));
    multiply_p(pass, p, block, rows, product, scratch);
    round_p(pass, p, block, product);
  }
  pack_p_of_x(pass, block, slot);
}

// h = act(G, U) of an MC range, columns nc; G and U are kept where backward wants them.
void activate(const Pass& pass, const BlockRows& mc, Range nc, const std::array<float*, 2>& g_u,
              Arena& scratch) {
  const Arena::Frame frame(scratch);
  const Span span(pass.recorder(scratch), Stage::activation);
  const index_t width = nc.size();
  // Not at the start of a line: whole lines may be stored past the caches, and these rows are never read.
  auto* unsaved = scratch.take<bf16_t>(width + 1) + 1;
  for (index_t i = 0; i < mc.count(); ++i) {
    const index_t at = (mc.rows.begin + i) * pass.plan.width(mc.block) + nc.begin;
    const auto row_of = [&](const float* rows) { return rows == nullptr ? nullptr : rows + i * width; };
    const auto to = [&](const ByBlock& kept) { return kept.empty() ? unsaved : kept[mc.block.index] + at; };
    pass.activation.forward(to_int(width), row_of(g_u[0]), row_of(g_u[1]), to(pass.gate), to(pass.up),
                            pass.h[mc.block.index] + at);
  }
}

// G = X Wg' + Pg Bg' + bg, U likewise, and h, columns nc.
void gate_up(const Pass& pass, const Block& block, index_t, Range nc, Range next, Arena& scratch) {
  const PackedInput& x = pass.packed_x[block.packer];
  std::array<ForwardWeights, 2> weights;
  std::array<float*, 2> result{};
  for (const Projection p : pass.x_projections()) {
    weights[index_of(p)] = forward_weights(pass, p, block, x, nc, next, scratch);
    result[index_of(p)] = scratch.take<float>(pass.kernels().gemm.nr * nc.size());
  }
  pass.plan.for_forward_mc_ranges(block, [&](const BlockRows& mc) {
    for (const Projection p : pass.x_projections())
      multiply_forward(pass, p, {&weights[index_of(p)], 1}, mc, result[index_of(p)], nc.size(), scratch);
    activate(pass, mc, nc, result, scratch);
  });
}

// h, packed, and its product with Ad'.
void pack_h(Pass& pass, const Block& block, float* product, Arena& scratch) {
  PackedInput& h = pass.packed_h[block.index];
  if (!by_gemv(block))
    h.rows = pack_b_cols_into(h.panels, pass.kernels(),
                              pass.input(Projection::down, block, {0, pass.plan.width(block)}));
  if (pass.lora(Projection::down)) multiply_p(pass, Projection::down, block, h.rows, product, scratch);
}

// Pd = s h Ad' of that product, packed behind h.
void pack_p_of_h(Pass& pass, const Block& block, float* product, Arena&) {
  if (!pass.lora(Projection::down)) return;
  round_p(pass, Projection::down, block, product);
  pack_p(pass, kDown, block, pass.packed_h[block.index].panels, pass.packed_h[block.index]);
}

// h Wd' + Pd Bd' + bd, columns nc, summed over the shards that are here.
void down(const Pass& pass, std::span<const Block> blocks, Range nc, Range next, float* rows, index_t stride,
          Arena& scratch) {
  std::vector<ForwardWeights> weights;
  for (const Block& block : blocks)
    weights.push_back(
        forward_weights(pass, Projection::down, block, pass.packed_h[block.index], nc, next, scratch));
  pass.plan.for_forward_mc_ranges(blocks.front(), [&](const BlockRows& mc) {
    multiply_forward(pass, Projection::down, weights, mc, rows + mc.rows.begin * stride, stride, scratch);
  });
}

}  // namespace

// ---- The tasks

TaskGraph::Groups add_gate_up(Pass& pass) {
  const Plan& plan = pass.plan;
  const index_t hidden = pass.experts.hidden;
  const GemmKernels& gemm = pass.kernels().gemm;
  for (const ShardSlice& shard : plan.shards)
    pass.gate_up_ranges.push_back(plan.nc_ranges(
        shard.range.size(), gemm.mr, std::ssize(pass.x_projections()) * hidden * gemm.element_bytes));
  pass.packed_x.resize(plan.blocks.size());
  const bool lora = pass.lora(Projection::gate) || pass.lora(Projection::up);
  const index_t slot_bytes = packed_input_bytes(pass, pass.x_projections(), plan.most_rows, hidden);
  return add_packed_products(pass,
                             {Stage::gate_up, pack_x, lora ? pack_p_of_x : nullptr, slot_bytes, gate_up,
                              cost_of_gate_up, pass.gate_up_ranges},
                             /*ready=*/{});
}

void forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
             Result out) {
  constexpr Projection down_p = Projection::down;
  Pass pass(runtime, experts, inputs, Direction::forward);
  pass.gate = pass.saved_inner(saved.gate), pass.up = pass.saved_inner(saved.up);
  pass.h = pass.take_inner();
  for (const Projection p : pass.x_projections()) {
    bf16_t* kept = saved.p[index_of(p)];
    pass.p_transposed[index_of(p)] = saved ? pass.saved_p(p, kept) : pass.take_p_or_q(p);
  }
  pass.p_transposed[index_of(down_p)] = pass.take_p_or_q(down_p);
  pass.weighted_p_transposed = pass.saved_p(down_p, saved.p[index_of(down_p)]);
  for (const Block& block : pass.plan.blocks)
    pass.packed_h.push_back(
        {pass.arena(block).take<char>(packed_input_bytes(pass, kDown, block.count, pass.plan.width(block)))});

  const GemmKernels& gemm = pass.kernels().gemm;
  const auto h_done = add_gate_up(pass);
  const auto packed = add_shard_sums(pass, {Stage::pack_h, p_floats_of_down, pack_h, pack_p_of_h}, h_done);
  Combine combine(pass, out, /*weighted=*/true, gemm.mr, gemm.element_bytes, packed);
  combine.add_tasks(Stage::down, down, cost_of_down);
  pass.run();
  for (int e = 0; experts.routed != nullptr && e < experts.num_experts; ++e)
    experts.routed[e] += pass.routing.count(e);
}

}  // namespace kt
