// The backward pass of a layer, from dY = dOut[token] (src/cpp/README.md has the formulas):
//     Q = s dY Bd,  dh' = dY Wd + Q Ad,  dw = <dh', h> + <dY, bd>,  dG and dU from w dh' and the saved G, U
//     Q = s dG B of gate and up,  dX[t] += dG Wg + dU Wu + Qg Ag + Qu Au,  dA = Q' X,  dB = dOutput' P
// First the verbs, which compute on one block and know nothing of tasks; then the tasks that name them.
// lora.cpp has those of Q, dA and dB.
#include <algorithm>

#include "moe/combine.h"
#include "moe/cost.h"
#include "moe/linear.h"
#include "moe/lora.h"

namespace kt {

namespace {

using Groups = TaskGraph::Groups;

constexpr index_t kDotCols = 64;  // of h, that one dot of few rows sums
constexpr index_t kRowsAhead = 8;

index_t packed_gradient_bytes(const Pass& pass, Projection p, index_t rows, index_t cols) {
  return packed_a_bytes(pass.kernels(), rows, cols) + packed_a_bytes(pass.kernels(), rows, pass.rank(p));
}

// Short rows far apart are more than the hardware foresees.
void prefetch(const bf16_t* row, index_t n) {
  for (index_t i = 0; i < n; i += 64 / static_cast<index_t>(sizeof *row)) __builtin_prefetch(row + i);
}

// The gradients of the routing weights in the making: dots <dh', h> of all routed tokens, row after row.
// Every row has some columns of h; a shard's rows follow those of the shard before. With a bias of down, <dY,
// bd> is the last row.
struct Dots {
  float* rows;
  index_t count, routes;
  std::vector<index_t> first_row;  // of each shard
  bool by_columns;                 // a row for every kDotCols columns; else for every NC range
  bool biased;

  float* row(index_t i) const { return rows + i * routes; }
  float* of_bias() const { return row(count - 1); }
};

// The number of threads decides how few rows are cut, but not how their dots are: the sums would differ.
Dots take_dots(Pass& pass, const std::vector<NcRanges>& ranges) {
  Dots dots{nullptr,
            0,
            pass.routing.routes(),
            {},
            pass.plan.all_small_m,
            pass.experts.biases[index_of(Projection::down)] != nullptr};
  for (std::size_t s = 0; s < ranges.size(); ++s) {
    dots.first_row.push_back(dots.count);
    dots.count += dots.by_columns ? ceil_div(ranges[s].n, kDotCols) : ranges[s].count;
  }
  dots.count += dots.biased;
  dots.rows = pass.lease.memory(0).take<float>(dots.count * dots.routes);
  std::fill_n(dots.rows, dots.count * dots.routes, 0.0f);
  return dots;
}

// ---- The verbs

// The gradient of a projection's output, a block's rows, packed. Returns what is behind it in memory.
char* pack_grad(Pass& pass, Projection p, const Block& block, char* into) {
  const index_t n = pass.rows(p, block);
  if (!pass.plan.small_m(block))
    pass.packed_grad[index_of(p)][block.index].rows =
        pack_a_into(into, pass.kernels(), pass.grad_output(p, block, {0, n}));
  return into + packed_a_bytes(pass.kernels(), block.count, n);
}

// <dY, bd> of a block's rows: what the bias of down adds to the gradient of their routing weights.
void bias_dots(const Pass& pass, const Block& block, const Dots& dots, Arena& scratch) {
  const index_t hidden = pass.experts.hidden;
  const bf16_t* bias = pass.experts.bias(Projection::down, block.expert);
  const Rows row{view(bias, DType::bf16, 1, hidden)};
  for_mc_ranges(block, pass.kernels().few.max_rows, [&](const Block& mc) {
    multiply_few_transposed(pass.kernels(), pass.grad_output(Projection::down, mc, {0, hidden}), row,
                            dots.of_bias() + mc.first, /*stride=*/1, /*accumulate=*/false, scratch);
  });
}

// Q = s dY Bd.
void shrink_dy(Pass& pass, const Block& block, Arena& scratch) {
  const Arena::Frame frame(scratch);
  auto* product = scratch.take<float>(q_product_floats(pass, Projection::down, block));
  multiply_b(pass, Projection::down, block, product, scratch);
  round_q(pass, Projection::down, block, product, scratch);
}

// dG, dU, h and <dh', h> of an MC range, columns nc, from dh' and the saved G and U.
void activate_grad(const Pass& pass, const Block& mc, Range nc, const float* dh, index_t stride, float* dots,
                   index_t dot_cols, Arena& scratch) {
  const Span span(pass.recorder(scratch), Stage::grad_activation);
  const std::size_t b = mc.index;
  const index_t n = pass.plan.width(mc), last = pass.plan.blocks[b].count;
  for (index_t i = 0; i < mc.count; ++i) {
    const index_t row = pass.plan.within(mc).begin + i, route = mc.first + i;
    if (const index_t ahead = row + kRowsAhead; ahead < last)
      for (const bf16_t* rows : {pass.gate[b], pass.up[b]}) prefetch(rows + ahead * n + nc.begin, nc.size());
    for (index_t j = 0; j < nc.size(); j += dot_cols) {
      const index_t at = row * n + nc.begin + j;
      dots[j / dot_cols * pass.routing.routes() + route] =
          pass.activation.backward(to_int(std::min(dot_cols, nc.size() - j)), dh + i * stride + j,
                                   pass.route_weight(route), pass.gate[b] + at, pass.up[b] + at,
                                   pass.d_gate_up[0][b] + at, pass.d_gate_up[1][b] + at, pass.h[b] + at);
    }
  }
}

// dh' = dY Wd + Q Ad, and dG, dU, h and <dh', h> from it, columns nc.
void grad_down(const Pass& pass, const Block& block, Range nc, Range next, float* dots, index_t dot_cols,
               Arena& scratch) {
  BackwardWeights weights;
  add_backward_weights(pass, kDown, block, nc, next, weights, scratch);
  const index_t stride = result_stride(pass.kernels(), nc.size());
  auto* dh = scratch.take<float>(backward_mc(pass) * stride);
  for_mc_ranges(block, backward_mc(pass), [&](const Block& mc) {
    const Arena::Frame frame(scratch);
    multiply_backward(pass, weights, mc, nc, dh, stride, scratch);
    activate_grad(pass, mc, nc, dh, stride, dots, dot_cols, scratch);
  });
}

// The gradients of the routing weights, each its dots added in order; 0 where there is no expert.
void sum_dots(const Pass& pass, const Dots& dots, float* grad_topk_weights) {
  std::fill_n(grad_topk_weights, pass.inputs.topk_weights.rows * pass.inputs.topk_weights.cols, 0.0f);
  for (index_t i = 0; i < dots.count; ++i)
    for (index_t r = 0; r < dots.routes; ++r)
      grad_topk_weights[pass.routing.slot[static_cast<std::size_t>(r)]] += dots.row(i)[r];
}

// dG Wg + dU Wu + Qg Ag + Qu Au, columns nc, summed over the shards that are here.
void grad_gate_up(const Pass& pass, std::span<const Block> blocks, Range nc, Range next, float* rows,
                  index_t stride, Arena& scratch) {
  BackwardWeights weights;
  for (const Block& block : blocks) add_backward_weights(pass, kGateUp, block, nc, next, weights, scratch);
  for_mc_ranges(blocks.front(), backward_mc(pass), [&](const Block& mc) {
    const Arena::Frame frame(scratch);
    multiply_backward(pass, weights, mc, nc, rows + pass.plan.within(mc).begin * stride, stride, scratch);
  });
}

// ---- The tasks

// The tasks of all blocks that compute Q of down, dG, dU and h, and the gradients of the routing weights.
// `recomputed`: what the latter two wait for, by block; empty where forward kept G and U.
Groups add_grad_down(Pass& pass, const Groups& recomputed, float* grad_topk_weights) {
  constexpr Projection down = Projection::down;
  const Plan& plan = pass.plan;
  const KernelSet& kernels = pass.kernels();
  const index_t tile = plan.all_small_m ? kDotCols : kernels.gemm.nr;
  std::vector<NcRanges> ranges;  // by shard
  for (const ShardSlice& shard : plan.shards)
    ranges.push_back(
        plan.nc_ranges(shard.range.size(), tile, pass.experts.hidden * kernels.gemm.element_bytes));
  const Dots dots = take_dots(pass, ranges);
  const PackSchedule schedule(plan);
  const index_t slot_bytes = packed_gradient_bytes(pass, down, plan.most_rows, pass.experts.hidden);
  const std::vector<char*> rings = pass.take_rings(schedule, slot_bytes);
  const bool lora{pass.lora(down)};
  Groups packed(plan.blocks.size()), done(plan.blocks.size());  // by block
  for (const PackSchedule::Step& step : schedule.steps) {
    const Block& block = plan.blocks[step.block];
    if (step.packs) {
      char* slot = rings[block.team] + step.slot * slot_bytes;
      packed[block.index] = pass.tasks.add(
          pass.label(Stage::gather, block), block.team, 1, of_readers(plan, step.emptied, done),
          [&pass, &block, dots, slot, lora](index_t, Arena& scratch) {
            char* behind = pack_grad(pass, down, block, slot);
            if (!pass.plan.is_root(block)) return;
            if (dots.biased) bias_dots(pass, block, dots, scratch);
            if (!lora) return;
            shrink_dy(pass, block, scratch);
            pass.packed_grad[index_of(down)][block.index].low_rank = pack_q(pass, down, block, behind);
          },
          [&pass, &block](index_t) { return cost_of_packing(pass, block); });
      if (lora && !plan.is_root(block))
        packed[block.index] = pass.tasks.add(
            pass.label(Stage::gather, block), block.team, 1,
            Groups{packed[block.index], packed[plan.root(block).index]},
            [&pass, &block, behind = slot + packed_a_bytes(kernels, block.count, pass.experts.hidden)](
                index_t, Arena&) {
              pass.packed_grad[index_of(down)][block.index].low_rank = pack_q(pass, down, block, behind);
            });
    } else {
      const NcRanges cut = ranges[block.shard];
      const index_t per_task = plan.ranges_per_task(cut);
      Groups after{packed[block.packer]};
      if (!recomputed.empty()) after.push_back(recomputed[block.index]);
      done[block.index] = pass.tasks.add(
          pass.label(Stage::grad_down, block), block.team, ceil_div(cut.count, per_task), std::move(after),
          [&pass, &block, dots, cut, per_task](index_t task, Arena& scratch) {
            for_nc_ranges(cut, task, per_task, [&](index_t i, Range nc, Range next) {
              const Arena::Frame frame(scratch);
              const index_t row = dots.first_row[block.shard] + (dots.by_columns ? nc.begin / kDotCols : i);
              grad_down(pass, block, nc, next, dots.row(row), dots.by_columns ? kDotCols : nc.size(),
                        scratch);
            });
          },
          [&pass, &block, cut, per_task, recompute = !recomputed.empty()](index_t task) {
            return cost_of_grad_down(pass, block, nc_of_task(cut, task, per_task), recompute);
          });
    }
  }
  if (grad_topk_weights != nullptr)
    pass.tasks.add(Stage::dots, 0, 1, done, [&pass, dots, grad_topk_weights](index_t, Arena&) {
      sum_dots(pass, dots, grad_topk_weights);
    });
  return done;
}

// The tasks of all blocks that pack dG and dU, and compute Q of gate and up.
Groups add_gate_up_low_rank(Pass& pass, const Groups& d_gate_up_done) {
  const Plan& plan = pass.plan;
  const bool lora = pass.lora(Projection::gate) || pass.lora(Projection::up),
             sharded = plan.shards.size() > 1;
  std::vector<std::array<char*, 2>> into(plan.blocks.size());  // by block: packed dG and dU, each with its Q
  std::vector<float*> products(plan.blocks.size());            // by block: the partial sums of shards
  const auto product_floats = [&pass](const Block& block) {
    return q_product_floats(pass, Projection::gate, block) + q_product_floats(pass, Projection::up, block);
  };
  for (const Block& block : plan.blocks) {
    for (const Projection p : kGateUp)
      into[block.index][index_of(p)] =
          pass.memory(block).take<char>(packed_gradient_bytes(pass, p, block.count, plan.width(block)));
    if (sharded && lora) products[block.index] = pass.memory(block).take<float>(product_floats(block));
  }
  const auto finish_q = [&pass, into](const Block& block, float* product, Arena& scratch) {
    for (const Projection p : kGateUp) {
      if (pass.lora(p)) {
        round_q(pass, p, block, product, scratch);
        char* behind = into[block.index][index_of(p)] +
                       packed_a_bytes(pass.kernels(), block.count, pass.plan.width(block));
        pass.packed_grad[index_of(p)][block.index].low_rank = pack_q(pass, p, block, behind);
      }
      product += q_product_floats(pass, p, block);
    }
  };
  Groups done(plan.blocks.size());
  for (const Block& block : plan.blocks)
    done[block.index] = pass.tasks.add(
        pass.label(Stage::gather_grad, block), block.team, 1, d_gate_up_done[block.index],
        [=, &pass, &block, own = into[block.index], partial = products[block.index]](index_t,
                                                                                     Arena& scratch) {
          float* const product = sharded || !lora ? partial : scratch.take<float>(product_floats(block));
          float* next = product;
          for (const Projection p : kGateUp) {
            pack_grad(pass, p, block, own[index_of(p)]);
            if (pass.lora(p)) multiply_b(pass, p, block, next, scratch);
            if (lora) next += q_product_floats(pass, p, block);
          }
          if (lora && !sharded) finish_q(block, product, scratch);
        });
  if (!sharded || !lora) return done;
  for (const Block& block : plan.blocks)
    if (plan.is_root(block))
      done[block.index] = pass.tasks.add(
          pass.label(Stage::merge, block), block.team, 1, of_token_block(plan, block, done),
          [=, &pass, &block](index_t, Arena& scratch) {
            finish_q(block, sum_over_shards(pass, block, products, product_floats(block), scratch), scratch);
          });
  return done;
}

void add_grad_gate_up(Pass& pass, Combine& combine) {
  for (std::size_t c = 0; c < combine.steps(); ++c) {
    for (std::size_t l = 0; c < combine.chunks() && l < combine.partials().size(); ++l) {
      const Partial& partial = combine.partials()[l];
      combine.set_products(
          c, pass.tasks.add(
                 {Stage::grad_hidden, {partial.shard}}, partial.team, std::ssize(partial.products),
                 combine.before_products(c, l),
                 [&, c, l](index_t task, Arena& scratch) {
                   const std::vector<Block>& blocks = partial.products[static_cast<std::size_t>(task)];
                   float* rows = combine.row(c, l, blocks.front().first);
                   combine.for_chunk_nc_ranges(c, blocks.front(), [&](Range nc, Range next, index_t offset) {
                     const Arena::Frame frame(scratch);
                     grad_gate_up(pass, blocks, nc, next, rows + offset, combine.stride(), scratch);
                   });
                 },
                 [&, c](index_t task) {
                   return cost_of_grad_gate_up(pass, partial.products[static_cast<std::size_t>(task)],
                                               combine.chunk(c));
                 }));
    }
    combine.add_sums(c);
  }
}

}  // namespace

void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
              const MatView& grad_out, const LayerGradients& gradients) {
  Pass pass(runtime, experts, inputs, Direction::backward);
  pass.grad_out = grad_out;
  const bool recompute = !saved;
  pass.h = pass.take_inner();
  pass.d_gate_up = {pass.take_inner(), pass.take_inner()};
  pass.gate = recompute ? pass.take_inner() : pass.saved_inner(saved.gate);
  pass.up = recompute ? pass.take_inner() : pass.saved_inner(saved.up);
  for (const Projection p : projections) {
    const std::size_t i = index_of(p);
    ByBlock& kept = p == Projection::down ? pass.weighted_lora_p : pass.lora_p[i];
    kept = recompute ? pass.take_low_rank(p) : pass.saved_low_rank(p, saved.low_rank[i]);
    pass.lora_q[i] = pass.take_low_rank(p), pass.lora_q_transposed[i] = pass.take_low_rank(p);
    pass.packed_grad[i].resize(pass.plan.blocks.size());
  }

  Groups recomputed;
  if (recompute) recomputed = add_down_low_rank(pass, add_gate_up(pass), /*pack=*/false);
  const Groups d_gate_up_done = add_grad_down(pass, recomputed, gradients.topk_weights);
  const Groups packed = add_gate_up_low_rank(pass, d_gate_up_done);
  std::optional<Combine> combine;
  if (gradients.hidden_states) {
    const GemmKernels& gemm = pass.kernels().gemm;
    combine.emplace(pass, gradients.hidden_states, /*weighted=*/false, gemm.nr, 2 * gemm.element_bytes,
                    packed);
    add_grad_gate_up(pass, *combine);
  }
  add_lora_gradients(pass, gradients, packed);
  pass.run();
}

}  // namespace kt
