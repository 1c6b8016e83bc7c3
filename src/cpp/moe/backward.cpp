// The backward pass of a layer, from dY = dOut[token] (src/cpp/README.md has the formulas):
//     Q = s dY Bd,  dh = dY Wd + Q Ad,  dw = <dh, h> + <dY, bd>,  dG and dU from w dh and the saved G, U
//     Q = s dG B of gate and up,  dX[t] += dG Wg + dU Wu + Qg Ag + Qu Au,  dA = Q' input,  dB = dOutput' P
// First the verbs, which compute on one block and know nothing of tasks; then the tasks that name them.
// lora.cpp has those of Q, dA and dB.
#include <algorithm>
#include <optional>

#include "moe/combine.h"
#include "moe/linear.h"
#include "moe/schedule.h"

namespace kt {

namespace {

using Groups = TaskGraph::Groups;

constexpr index_t kDotCols = 64;  // of h, that one dot of a GEMV sums
constexpr index_t kRowsAhead = 8;

// Short rows far apart are more than the hardware foresees.
void prefetch(const bf16_t* row, index_t n) {
  for (index_t i = 0; i < n; i += 64 / static_cast<index_t>(sizeof *row)) __builtin_prefetch(row + i);
}

// The number of threads decides how a GEMV is cut, but not how its dots are: the sums would differ.
Dots take_dots(Pass& pass) {
  Dots dots{nullptr,
            0,
            pass.routing.routes(),
            {},
            pass.plan.all_by_gemv,
            pass.experts.biases[index_of(Projection::down)] != nullptr};
  for (const NcRanges& ranges : pass.grad_down_ranges) {
    dots.first_row.push_back(dots.count);
    dots.count += dots.by_columns ? ceil_div(ranges.n, kDotCols) : ranges.count;
  }
  dots.count += dots.biased;
  dots.rows = pass.lease.arena(0).take<float>(dots.count * dots.routes);
  std::fill_n(dots.rows, dots.count * dots.routes, 0.0f);
  return dots;
}

// ---- The verbs

// The gradient of a projection's output, packed.
void pack_grad_rows(Pass& pass, Projection p, const Block& block, char* into) {
  if (!by_gemv(block))
    pass.packed_grad[index_of(p)][block.index].rows =
        pack_a_into(into, pass.kernels(), pass.grad_output(p, block, {0, pass.rows(p, block)}));
}

// <dY, bd> of a block's rows: what the bias of down adds to the gradient of their routing weights.
void bias_dots(const Pass& pass, const Block& block, Arena& scratch) {
  const index_t hidden = pass.experts.hidden;
  const bf16_t* bias = pass.experts.bias(Projection::down, block.expert);
  const Rows row{view(bias, DType::bf16, 1, hidden)};
  for_mc_ranges(block, kGemvRows, [&](const BlockRows& mc) {
    gemv_nt(pass.kernels(), pass.grad_output(Projection::down, mc, {0, hidden}), row,
            pass.dots.of_bias() + mc.first(), /*stride=*/1,
            /*accumulate=*/false, scratch);
  });
}

// Q of down, packed behind the packed dY.
void pack_q_of_dy(Pass& pass, const Block& block, char* slot) { pack_q(pass, Projection::down, block, slot); }

// dY, packed, and Q = s dY Bd.
void pack_dy(Pass& pass, const Block& block, char* slot, Arena& scratch) {
  constexpr Projection down = Projection::down;
  pack_grad_rows(pass, down, block, slot);
  if (!pass.plan.is_root(block)) return;
  if (pass.dots.biased) bias_dots(pass, block, scratch);
  if (!pass.lora(down)) return;
  const Arena::Frame frame(scratch);
  auto* product = scratch.take<float>(q_product_floats(pass, down, block));
  multiply_q(pass, down, block, product, scratch);
  round_q(pass, down, block, product, scratch);
  pack_q_of_dy(pass, block, slot);
}

// dG, dU, h and <dh, h> of an MC range, columns nc, from dh and the saved G and U.
void activate_grad(const Pass& pass, const BlockRows& mc, Range nc, const float* dh, index_t stride,
                   float* dots, index_t dot_cols, Arena& scratch) {
  const Span span(pass.recorder(scratch), Stage::grad_activation);
  const std::size_t b = mc.block.index;
  const index_t n = pass.plan.width(mc.block), last = pass.plan.blocks[b].count;
  for (index_t i = 0; i < mc.count(); ++i) {
    const index_t row = mc.rows.begin + i, route = mc.first() + i;
    if (const index_t ahead = row + kRowsAhead; ahead < last)
      for (const ByBlock* saved : {&pass.gate, &pass.up})
        if (!saved->empty()) prefetch((*saved)[b] + ahead * n + nc.begin, nc.size());
    for (index_t j = 0; j < nc.size(); j += dot_cols) {
      const index_t at = row * n + nc.begin + j;
      const int width = to_int(std::min(dot_cols, nc.size() - j));
      const auto row_of = [&](const ByBlock& matrices) {
        return matrices.empty() ? nullptr : matrices[b] + at;  // there may be no gate
      };
      dots[j / dot_cols * pass.routing.routes() + route] = pass.activation.backward(
          width, dh + i * stride + j, pass.route_weight(route), row_of(pass.gate), row_of(pass.up),
          row_of(pass.d_gate_up[0]), row_of(pass.d_gate_up[1]), row_of(pass.h));
    }
  }
}

// dh = dY Wd + Q Ad, and dG, dU, h and <dh, h> from it, columns nc.
void grad_down(const Pass& pass, const Block& block, index_t range, Range nc, Range next, Arena& scratch) {
  const Dots& dots = pass.dots;
  const index_t first = dots.first_row[block.shard] + (dots.by_columns ? nc.begin / kDotCols : range);
  const index_t dot_cols = dots.by_columns ? kDotCols : nc.size();
  BackwardWeights weights;
  add_backward_weights(pass, kDown, block, nc, next, weights, scratch);
  const index_t stride = min_ldc(pass.kernels(), nc.size());
  auto* dh = scratch.take<float>(backward_mc(pass) * stride);
  for_mc_ranges(block, backward_mc(pass), [&](const BlockRows& mc) {
    const Arena::Frame frame(scratch);
    multiply_backward(pass, weights, mc, nc, dh, stride, scratch);
    activate_grad(pass, mc, nc, dh, stride, dots.row(first), dot_cols, scratch);
  });
}

// The gradients of the routing weights, each its dots added in order; 0 where there is no expert.
void sum_dots(const Pass& pass, float* grad_topk_weights) {
  const Dots& dots = pass.dots;
  std::fill_n(grad_topk_weights, pass.inputs.topk_weights.rows * pass.inputs.topk_weights.cols, 0.0f);
  for (index_t i = 0; i < dots.count; ++i)
    for (index_t r = 0; r < dots.routes; ++r)
      grad_topk_weights[pass.routing.sorted_slots[to_size(r)]] += dots.row(i)[r];
}

// dG and dU, packed, and their products with B for Q; Q = s dG B of them.
void pack_d_gate_up(Pass& pass, const Block& block, float* product, Arena& scratch) {
  for (const Projection p : pass.x_projections()) {
    pack_grad_rows(pass, p, block, pass.packed_grad[index_of(p)][block.index].panels);
    if (!pass.lora(p)) continue;
    multiply_q(pass, p, block, product, scratch);
    product += q_product_floats(pass, p, block);
  }
}

void pack_q_of_d_gate_up(Pass& pass, const Block& block, float* product, Arena& scratch) {
  for (const Projection p : pass.x_projections()) {
    if (!pass.lora(p)) continue;
    round_q(pass, p, block, product, scratch);
    product += q_product_floats(pass, p, block);
    pack_q(pass, p, block, pass.packed_grad[index_of(p)][block.index].panels);
  }
}

index_t q_floats_of_gate_up(const Pass& pass, const Block& block) {
  index_t floats = 0;
  for (const Projection p : pass.x_projections()) floats += q_product_floats(pass, p, block);
  return floats;
}

// dG Wg + dU Wu + Qg Ag + Qu Au, columns nc, summed over the shards that are here.
void grad_gate_up(const Pass& pass, std::span<const Block> blocks, Range nc, Range next, float* rows,
                  index_t stride, Arena& scratch) {
  BackwardWeights weights;
  for (const Block& block : blocks)
    add_backward_weights(pass, pass.x_projections(), block, nc, next, weights, scratch);
  for_mc_ranges(blocks.front(), backward_mc(pass), [&](const BlockRows& mc) {
    const Arena::Frame frame(scratch);
    multiply_backward(pass, weights, mc, nc, rows + mc.rows.begin * stride, stride, scratch);
  });
}

// Where forward kept nothing: Pd = s h Ad' again.
void multiply_p_of_h(Pass& pass, const Block& block, float* product, Arena& scratch) {
  multiply_p(pass, Projection::down, block, /*packed=*/{}, product, scratch);
}

void round_p_of_h(Pass& pass, const Block& block, float* product, Arena&) {
  round_p(pass, Projection::down, block, product);
}

// ---- The tasks

// The tasks of all blocks that compute P, G, U and h again.
Groups add_recomputation(Pass& pass) {
  const Groups h_done = add_gate_up(pass);
  if (!pass.lora(Projection::down)) return h_done;
  return add_shard_sums(pass, {Stage::pack_h, p_floats_of_down, multiply_p_of_h, round_p_of_h}, h_done);
}

// The tasks of all blocks that compute Q of down, dG, dU, h and the gradients of the routing weights.
Groups add_grad_down(Pass& pass, const Groups& recomputed, float* grad_topk_weights) {
  const Plan& plan = pass.plan;
  const GemmKernels& gemm = pass.kernels().gemm;
  const index_t hidden = pass.experts.hidden, tile = plan.all_by_gemv ? kDotCols : gemm.nr;
  for (const ShardSlice& shard : plan.shards)
    pass.grad_down_ranges.push_back(plan.nc_ranges(shard.range.size(), tile, hidden * gemm.element_bytes));
  pass.dots = take_dots(pass);
  const bool lora{pass.lora(Projection::down)};
  const index_t slot_bytes = packed_gradient_bytes(pass, Projection::down, plan.most_rows, hidden);
  const Groups done = add_packed_products(pass,
                                          {Stage::grad_down, pack_dy, lora ? pack_q_of_dy : nullptr,
                                           slot_bytes, grad_down, cost_of_grad_down, pass.grad_down_ranges},
                                          recomputed);
  if (grad_topk_weights != nullptr)
    pass.tasks.add(Stage::grad_topk_weights, 0, 1, done,
                   [&pass, grad_topk_weights](index_t, Arena&) { sum_dots(pass, grad_topk_weights); });
  return done;
}

}  // namespace

void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
              const MatView& grad_out, const LayerGradients& gradients) {
  Pass pass(runtime, experts, inputs, Direction::backward);
  pass.grad_out = grad_out;
  pass.recompute = !saved;
  pass.h = pass.take_inner();
  const std::array saved_g_u{saved.gate, saved.up};
  for (const Projection p : pass.x_projections()) {
    pass.d_gate_up[index_of(p)] = pass.take_inner();
    (p == Projection::gate ? pass.gate : pass.up) =
        saved ? pass.saved_inner(saved_g_u[index_of(p)]) : pass.take_inner();
  }
  for (const Projection p : pass.projections()) {
    const std::size_t i = index_of(p);
    ByBlock& kept = p == Projection::down ? pass.weighted_p_transposed : pass.p_transposed[i];
    kept = saved ? pass.saved_p(p, saved.p[i]) : pass.take_p_or_q(p);
    pass.lora_q[i] = pass.take_p_or_q(p), pass.lora_q_transposed[i] = pass.take_p_or_q(p);
    pass.packed_grad[i].resize(pass.plan.blocks.size());
    for (const Block& block : pass.plan.blocks)
      if (p != Projection::down)
        pass.packed_grad[i][block.index].panels =
            pass.arena(block).take<char>(packed_gradient_bytes(pass, p, block.count, pass.plan.width(block)));
  }

  const Groups recomputed = saved ? Groups() : add_recomputation(pass);
  const Groups d_gate_up_done = add_grad_down(pass, recomputed, gradients.topk_weights);
  const Groups packed = add_shard_sums(
      pass, {Stage::pack_grad, q_floats_of_gate_up, pack_d_gate_up, pack_q_of_d_gate_up}, d_gate_up_done);
  std::optional<Combine> combine;
  if (gradients.hidden_states) {
    const GemmKernels& gemm = pass.kernels().gemm;
    combine.emplace(pass, gradients.hidden_states, /*weighted=*/false, gemm.nr,
                    std::ssize(pass.x_projections()) * gemm.element_bytes, packed);
    combine->add_tasks(Stage::grad_hidden, grad_gate_up, cost_of_grad_gate_up);
  }
  add_lora_gradients(pass, gradients, packed);
  pass.run();
}

}  // namespace kt
