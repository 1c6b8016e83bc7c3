#include "moe/backward.h"

#include <algorithm>

namespace kt {

namespace {

constexpr index_t kDotCols = 64;  // of h that one dot of few rows sums
constexpr index_t kRowsAhead = 8;

// Short rows far apart are more than the hardware foresees.
void prefetch(const bf16_t* row, index_t n) {
  for (index_t i = 0; i < n; i += 64 / static_cast<index_t>(sizeof *row)) __builtin_prefetch(row + i);
}

}  // namespace

void Backward::run(const Saved& saved) {
  const bool recompute = !saved;
  hidden_ = take_inner();
  grad_gate_up_ = {take_inner(), take_inner()};
  saved_gate_ = recompute ? take_inner() : cut_inner(saved.gate);
  saved_up_ = recompute ? take_inner() : cut_inner(saved.up);
  for (const Projection p : projections) {
    const std::size_t i = index_of(p);
    ByBlock& kept = p == Projection::down ? weighted_low_rank_ : low_rank_[i];
    kept = recompute ? take_low_rank(p) : cut_low_rank(p, saved.low_rank[i]);
    grad_low_rank_[i] = {take_low_rank(p), take_low_rank(p)};
    grad_inputs_[i].resize(blocks_.size());
  }
  if (recompute) {
    add_gate_up();
    add_down_low_rank();
  }
  add_down();
  add_gate_up_gradients();
  if (gradients_.hidden_states) add_hidden_states();
  add_lora();
  run_tasks();
}

void Backward::add_down_low_rank() {
  constexpr Projection down = Projection::down;
  add_reduced(Stage::hidden, gate_up_done_,
              {[this](Block block) { return product_floats(down, block); },
               [this](Block block, float* product, Arena& scratch) {
                 if (inputs_.of(down)) multiply_a(down, block, {}, product, scratch);
               },
               [this](Block block, float* product, Arena&) { keep_low_rank(down, block, product); }},
              recomputed_);
}

void Backward::add_down() {
  constexpr Projection down = Projection::down;
  const index_t routes = routing_.routes();
  // The number of threads decides how few rows are cut, but not how their dots are: the sums would differ.
  const bool fixed = all_few();
  const index_t tile = fixed ? kDotCols : kernels().gemm.nr;
  std::vector<Slices> slices;
  std::vector<index_t> first_dot;  // of a shard
  index_t count = 0;
  for (const Portion& shard : shards_) {
    slices.push_back(this->slices(shard.inner.size(), tile, experts_.hidden * kernels().gemm.element_bytes));
    first_dot.push_back(count);
    count += fixed ? ceil_div(shard.inner.size(), kDotCols) : slices.back().count;
  }
  const bool biased = experts_.biases[index_of(down)] != nullptr;
  const index_t rows = count + biased;
  auto* dots = lease_.memory(0).take<float>(rows * routes);
  std::fill_n(dots, rows * routes, 0.0f);
  const index_t packed_rows = packed_a_bytes(kernels(), most_rows_, experts_.hidden);
  add_with_input(
      Stage::grad_down, packed_rows + packed_a_bytes(kernels(), most_rows_, inputs_.of(down).rank()), slices,
      {[=, this](Block block, char* memory, const Group* home, Arena& scratch) {
         pack_grad_rows(down, block, memory);
         if (home != nullptr) tasks_.wait(home, scratch);
         if (home == nullptr && biased) bias_dots(block, dots + count * routes, scratch);
         if (!inputs_.of(down)) return;
         if (home == nullptr) {
           const Arena::Frame frame(scratch);
           auto* product = scratch.take<float>(grad_product_floats(down, block));
           multiply_b(down, block, product, scratch);
           keep_grad_low_rank(down, block, product, scratch);
         }
         pack_grad_low_rank(down, block, memory + packed_rows);
       },
       [=, this](Block block, index_t i, Range slice, Range next, Arena& scratch) {
         if (!recomputed_.empty()) tasks_.wait(recomputed_[block.index], scratch);
         const index_t dot = first_dot[block.shard] + (fixed ? slice.begin / kDotCols : i);
         this->down(block, slice, next, dots + dot * routes, fixed ? kDotCols : slice.size(), scratch);
       }},
      down_done_);
  if (gradients_.topk_weights != nullptr)
    tasks_.add(Stage::dots, 0, 1, [=, this](index_t, Arena& scratch) {
      for (const Group* done : down_done_) tasks_.wait(done, scratch);
      sum_dots(dots, rows);
    });
}

void Backward::down(Block block, Range slice, Range next, float* dots, index_t dot_cols,
                    Arena& scratch) const {
  const index_t n = inner(block);
  const bf16_t *const gate = saved_gate_[block.index], *const up = saved_up_[block.index];
  BackwardWeights weights;
  add_weights(kDown, block, slice, next, weights, scratch);
  const index_t stored = block.count * slice.size() * index_t{sizeof(bf16_t)};
  count(scratch, {0, 3 * stored, 0});  // dG, dU, h
  count(scratch, moved(2 * stored, recomputed_.empty() ? 0 : block.team, block.team));
  const index_t stride = result_stride(kernels(), slice.size());
  auto* grad = scratch.take<float>(rows_per_part() * stride);
  for_parts(block, rows_per_part(), [&](Block part) {
    const Arena::Frame frame(scratch);
    input_gradient(weights, part, slice, grad, stride, scratch);
    const Span span(recorder(scratch), Stage::grad_activation);
    for (index_t i = 0; i < part.count; ++i) {
      const index_t row = within(part).begin + i, route = part.first + i;
      if (const index_t ahead = row + kRowsAhead; ahead < block.count)
        for (const bf16_t* rows : {gate, up}) prefetch(rows + ahead * n + slice.begin, slice.size());
      for (index_t j = 0; j < slice.size(); j += dot_cols) {
        const index_t place = row * n + slice.begin + j;
        dots[j / dot_cols * routing_.routes() + route] = activation_.backward(
            static_cast<int>(std::min(dot_cols, slice.size() - j)), grad + i * stride + j, weight(route),
            gate + place, up + place, grad_gate_up_[0][block.index] + place,
            grad_gate_up_[1][block.index] + place, hidden_[block.index] + place);
      }
    }
  });
}

void Backward::bias_dots(Block block, float* dots, Arena& scratch) const {
  const bf16_t* bias = experts_.bias(Projection::down, block.expert);
  const Rows row{view(bias, DType::bf16, 1, experts_.hidden)};
  for_parts(block, kernels().few.max_rows, [&](Block part) {
    multiply_few_transposed(kernels(), grad_output(Projection::down, part, {0, experts_.hidden}), row,
                            dots + part.first, /*stride=*/1, /*accumulate=*/false, scratch);
  });
}

void Backward::sum_dots(const float* dots, index_t count) const {
  std::fill_n(gradients_.topk_weights, inputs_.topk_weights.rows * inputs_.topk_weights.cols, 0.0f);
  for (index_t i = 0; i < count; ++i)
    for (index_t r = 0; r < routing_.routes(); ++r)
      gradients_.topk_weights[routing_.slot[static_cast<std::size_t>(r)]] += dots[i * routing_.routes() + r];
}

void Backward::add_gate_up_gradients() {
  std::vector<std::array<char*, 2>> into;  // a block each
  for (const Block block : blocks_) {
    std::array<char*, 2>& pieces = into.emplace_back();
    for (const Projection p : kGateUp)
      pieces[index_of(p)] = memory(block).take<char>(grad_input_bytes(p, block));
  }
  const auto floats = [this](Block block) {
    return grad_product_floats(Projection::gate, block) + grad_product_floats(Projection::up, block);
  };
  add_reduced(Stage::gather_grad, down_done_,
              {floats,
               [=, this](Block block, float* product, Arena& scratch) {
                 for (const Projection p : kGateUp) {
                   pack_grad_rows(p, block, into[block.index][index_of(p)]);
                   if (inputs_.of(p)) multiply_b(p, block, product, scratch);
                   product += grad_product_floats(p, block);
                 }
               },
               [=, this](Block block, float* product, Arena& scratch) {
                 for (const Projection p : kGateUp) {
                   if (inputs_.of(p)) {
                     keep_grad_low_rank(p, block, product, scratch);
                     pack_grad_low_rank(p, block,
                                        into[block.index][index_of(p)] +
                                            packed_a_bytes(kernels(), block.count, inner(block)));
                   }
                   product += grad_product_floats(p, block);
                 }
               }},
              gradients_done_);
}

void Backward::add_hidden_states() {
  const GemmKernels& gemm = kernels().gemm;
  add_sum(
      Stage::grad_hidden, gradients_.hidden_states, /*weighted=*/false, gemm.nr, 2 * gemm.element_bytes,
      gradients_done_,
      [this](const Siblings& blocks, Range strip, Range next, float* rows, index_t stride, Arena& scratch) {
        BackwardWeights weights;
        for (const Block block : blocks) add_weights(kGateUp, block, strip, next, weights, scratch);
        for_parts(blocks.front(), rows_per_part(), [&](Block part) {
          const Arena::Frame frame(scratch);
          input_gradient(weights, part, strip, rows + within(part).begin * stride, stride, scratch);
        });
      });
}

Rows Backward::grad_output(Projection p, Block block, Range cols) const {
  if (p == Projection::down) return by_token(grad_out_, block, cols);
  return by_route(grad_gate_up_[index_of(p)], inner(block), block, cols);
}

index_t Backward::grad_input_bytes(Projection p, Block block) const {
  return packed_a_bytes(kernels(), block.count, rows(p, block)) +
         packed_a_bytes(kernels(), block.count, inputs_.of(p).rank());
}

void Backward::pack_grad_rows(Projection p, Block block, char* into) {
  if (few(block)) return;
  grad_inputs_[index_of(p)][block.index].rows =
      pack_a_into(into, kernels(), grad_output(p, block, {0, rows(p, block)}));
}

void Backward::pack_grad_low_rank(Projection p, Block block, char* into) {
  if (few(block)) return;
  const index_t rank = inputs_.of(p).rank();
  grad_inputs_[index_of(p)][block.index].low_rank =
      pack_a_into(into, kernels(), by_route(grad_low_rank_[index_of(p)].rows, rank, block, {0, rank}));
}

void Backward::add_weights(std::span<const Projection> targets, Block block, Range slice, Range next,
                           BackwardWeights& weights, Arena& scratch) const {
  const auto packed = [&](const auto& source) {
    return few(block) ? PackedB{} : pack_b_rows(kernels(), source, scratch);
  };
  for (const Projection p : targets) {
    const WeightBlock all = weights_of(p, block), w = all.cols_of(slice);
    count(scratch, {0, bytes_of(w), 0});
    const Span span(few(block) ? nullptr : recorder(scratch), packing(w));
    weights.push_back({block, p, false, w, {}, packed(w), codes_of(all.cols_of(next))});
  }
  for (const Projection p : targets)
    if (const LoraPair& lora = inputs_.of(p); lora && (p == Projection::down || at_home(block))) {
      const Rows a{lora_a(p, block).block(0, slice.begin, lora.rank(), slice.size())};
      weights.push_back({block, p, true, {}, a, packed(a), {} /* it is small */});
    }
}

void Backward::input_gradient(const BackwardWeights& weights, Block part, Range slice, float* result,
                              index_t stride, Arena& scratch) const {
  if (!inputs_.dropout.active()) return multiply_backward(weights, part, result, stride, scratch);

  BackwardWeights frozen = weights, loras;
  // Not std::ranges::stable_partition: clang 14 does not compile libstdc++'s std::ranges::subrange.
  const auto behind = std::stable_partition(frozen.begin(), frozen.end(),
                                            [](const BackwardTerm& term) { return !term.lora; });
  loras.assign(behind, frozen.end());
  frozen.erase(behind, frozen.end());
  multiply_backward(frozen, part, result, stride, scratch);
  auto* product = scratch.take<float>(part.count * stride);
  for (const BackwardTerm& term : loras) {  // what was dropped gets no gradient
    multiply_backward({&term, 1}, part, product, stride, scratch);
    for (index_t row = 0; row < part.count; ++row) {
      const std::int32_t slot = routing_.slot[static_cast<std::size_t>(part.first + row)];
      drop(inputs_.dropout, term.projection, slot, first_col(term.projection, part) + slice.begin,
           slice.size(), product + row * stride);
      const std::array<const float*, 2> terms{result + row * stride, product + row * stride};
      constexpr std::array kOnce{1.0f, 1.0f};
      kernels().epilogue.sum_scaled(static_cast<int>(slice.size()), 2, terms.data(), kOnce.data(),
                                    result + row * stride);
    }
  }
}

void Backward::multiply_backward(std::span<const BackwardTerm> weights, Block part, float* result,
                                 index_t stride, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  auto* terms = scratch.take<Term>(std::ssize(weights));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto& [block, p, lora, frozen, lora_a, packed, next] = weights[i];
    const index_t width = lora ? lora_a.matrix.cols : frozen.cols.size();
    count(scratch, {2 * part.count * width * (lora ? inputs_.of(p).rank() : rows(p, block)), 0, 0});
    if (few(part)) {
      const Block mine = of_sibling(block, part);
      const index_t rank = inputs_.of(p).rank();
      const Rows gradient = lora ? by_route(grad_low_rank_[index_of(p)].rows, rank, mine, {0, rank})
                                 : grad_output(p, mine, {0, rows(p, mine)});
      if (lora)
        multiply_few(kernels(), gradient, lora_a, result, stride, /*accumulate=*/i > 0, scratch);
      else
        multiply_few(kernels(), gradient, frozen, result, stride, /*accumulate=*/i > 0, scratch);
    } else {
      // What gate and up read lies by shard, what down reads by team.
      const std::size_t packs = p == Projection::down ? block.input : block.index;
      const GradInput& gradient = grad_inputs_[index_of(p)][packs];
      terms[i] = {rows_of(kernels(), lora ? gradient.low_rank : gradient.rows, within(part)), packed,
                  share(next, within(part), blocks_[part.index].count)};
    }
  }
  if (!few(part)) multiply(kernels(), {terms, weights.size()}, result, stride);
}

void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
              const MatView& grad_out, const LayerGradients& gradients) {
  Backward(runtime, experts, inputs, grad_out, gradients).run(saved);
}

}  // namespace kt
