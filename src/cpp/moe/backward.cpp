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

void Backward::run(Saved saved) {
  const index_t routes = routing_.routes(), n = experts_.intermediate;
  hidden_ = memory().take<bf16_t>(routes * n);
  grad_gate_up_ = {memory().take<bf16_t>(routes * n), memory().take<bf16_t>(routes * n)};
  for (const Projection p : projections) {
    const std::size_t i = index_of(p);
    grad_low_rank_[i] = {take_low_rank(p), take_low_rank(p)};
    grad_inputs_[i].resize(blocks_.size());
  }
  const bool recompute = !saved;
  if (recompute) {
    saved = {memory().take<bf16_t>(routes * n), memory().take<bf16_t>(routes * n), {}};
    for (const Projection p : projections) saved.low_rank[index_of(p)] = take_low_rank(p);
  }
  for (const Projection p : kGateUp) low_rank_[index_of(p)] = saved.low_rank[index_of(p)];
  weighted_low_rank_ = saved.low_rank[index_of(Projection::down)];
  if (recompute) {
    add_gate_up(saved);
    add_down_low_rank();
  }
  add_down(saved);
  add_gate_up_gradients();
  if (gradients_.hidden_states) add_hidden_states();
  add_lora();
  tasks_.run(lease_);
}

void Backward::add_down_low_rank() {
  for (const Block block : blocks_)
    recomputed_.push_back(tasks_.add(1, [=, this](index_t, Arena& scratch) {
      tasks_.wait(gate_up_done_[block.index]);
      if (inputs_.of(Projection::down)) project_a(Projection::down, block, {}, scratch);
    }));
}

void Backward::add_down(const Saved& saved) {
  const index_t n = experts_.intermediate, routes = routing_.routes();
  // The number of threads decides how few rows are cut, but not how their dots are: the sums would differ.
  const bool fixed = all_few();
  const index_t tile = fixed ? kDotCols : kernels().gemm.nr;
  const Slices slices = this->slices(n, tile, experts_.hidden * kernels().gemm.element_bytes);
  const index_t dot_cols = fixed ? kDotCols : n, count = fixed ? ceil_div(n, kDotCols) : slices.count;
  const bool biased = experts_.biases[index_of(Projection::down)] != nullptr;
  const index_t rows = count + biased;
  auto* dots = memory().take<float>(rows * routes);
  std::fill_n(dots, rows * routes, 0.0f);
  add_with_input(
      grad_input_bytes(Projection::down, kBlockRows),
      [=, this](Block block, char* memory, Arena& scratch) {
        pack_grad_input(Projection::down, block, memory, scratch);
        if (biased) bias_dots(block, dots + count * routes, scratch);
      },
      slices,
      [=, this](Block block, index_t i, Range slice, Range next, Arena& scratch) {
        if (!recomputed_.empty()) tasks_.wait(recomputed_[block.index]);
        float* first = dots + (fixed ? slice.begin / kDotCols : i) * routes;
        down(block, slice, next, saved, first, dot_cols, scratch);
      },
      down_done_);
  if (gradients_.topk_weights != nullptr)
    tasks_.add(1, [=, this](index_t, Arena&) {
      for (const Group* done : down_done_) tasks_.wait(done);
      sum_dots(dots, rows);
    });
}

void Backward::down(Block block, Range slice, Range next, const Saved& saved, float* dots, index_t dot_cols,
                    Arena& scratch) const {
  const index_t n = experts_.intermediate;
  const BackwardWeights weights = backward_weights(kDown, block, slice, next, scratch);
  const index_t stride = result_stride(kernels(), slice.size());
  auto* grad = scratch.take<float>(rows_per_part() * stride);
  for_parts(block, rows_per_part(), [&](Block part) {
    const Arena::Frame frame(scratch);
    input_gradient(weights, part, slice, grad, stride, scratch);
    for (index_t i = 0; i < part.count; ++i) {
      if (const index_t ahead = part.first + i + kRowsAhead; ahead < block.first + block.count)
        for (const bf16_t* rows : {saved.gate, saved.up})
          prefetch(rows + ahead * n + slice.begin, slice.size());
      for (index_t j = 0; j < slice.size(); j += dot_cols) {
        const index_t route = part.first + i, place = route * n + slice.begin + j;
        dots[j / dot_cols * routing_.routes() + route] =
            activation_.backward(static_cast<int>(std::min(dot_cols, slice.size() - j)),
                                 grad + i * stride + j, weight(route), saved.gate + place, saved.up + place,
                                 grad_gate_up_[0] + place, grad_gate_up_[1] + place, hidden_ + place);
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
  for (const Block block : blocks_) {
    std::array<char*, 2> into;
    for (const Projection p : kGateUp)
      into[index_of(p)] = memory().take<char>(grad_input_bytes(p, block.count));
    gradients_done_.push_back(tasks_.add(1, [=, this](index_t, Arena& scratch) {
      tasks_.wait(down_done_[block.index]);
      for (const Projection p : kGateUp) pack_grad_input(p, block, into[index_of(p)], scratch);
    }));
  }
}

void Backward::add_hidden_states() {
  const GemmKernels& gemm = kernels().gemm;
  add_sum(gradients_.hidden_states, /*weighted=*/false, gemm.nr,
          2 * experts_.intermediate * gemm.element_bytes, gradients_done_,
          [this](Block block, Range strip, Range next, float* rows, index_t stride, Arena& scratch) {
            hidden_states(block, strip, next, rows, stride, scratch);
          });
}

void Backward::hidden_states(Block block, Range strip, Range next, float* rows, index_t stride,
                             Arena& scratch) const {
  const BackwardWeights weights = backward_weights(kGateUp, block, strip, next, scratch);
  for_parts(block, rows_per_part(), [&](Block part) {
    const Arena::Frame frame(scratch);
    input_gradient(weights, part, strip, rows + within(part).begin * stride, stride, scratch);
  });
}

Rows Backward::grad_output(Projection p, Block block, Range cols) const {
  if (p == Projection::down) return by_token(grad_out_, block, cols);
  return by_route(grad_gate_up_[index_of(p)], experts_.intermediate, block, cols);
}

index_t Backward::grad_input_bytes(Projection p, index_t routes) const {
  return packed_a_bytes(kernels(), routes, experts_.rows(p)) +
         packed_a_bytes(kernels(), routes, inputs_.of(p).rank());
}

void Backward::pack_grad_input(Projection p, Block block, char* into, Arena& scratch) {
  GradInput& in = grad_inputs_[index_of(p)][block.index];
  const index_t cols = experts_.rows(p), rank = inputs_.of(p).rank();
  if (!few(block)) in.rows = pack_a_into(into, kernels(), grad_output(p, block, {0, cols}));
  if (rank == 0) return;
  project_grad_b(p, block, in.rows, scratch);
  if (few(block)) return;
  in.low_rank = pack_a_into(into + packed_a_bytes(kernels(), block.count, cols), kernels(),
                            by_route(grad_low_rank_[index_of(p)].rows, rank, block, {0, rank}));
}

Backward::BackwardWeights Backward::backward_weights(std::span<const Projection> targets, Block block,
                                                     Range slice, Range next, Arena& scratch) const {
  BackwardWeights result;
  const auto packed = [&](const auto& source) {
    return few(block) ? PackedB{} : pack_b_rows(kernels(), source, scratch);
  };
  for (const Projection p : targets) {
    const Weight& w = experts_.of(p, block.expert);
    const WeightBlock weights{&w, {0, w.rows}, slice};
    result.push_back({p, false, weights, {}, packed(weights), codes_of({&w, {0, w.rows}, next})});
  }
  for (const Projection p : targets)
    if (const LoraPair& lora = inputs_.of(p); lora) {
      const Rows rows{lora.a[block.expert].block(0, slice.begin, lora.rank(), slice.size())};
      result.push_back({p, true, {}, rows, packed(rows), {} /* it is small */});
    }
  return result;
}

void Backward::input_gradient(const BackwardWeights& weights, Block part, Range slice, float* result,
                              index_t stride, Arena& scratch) const {
  if (!inputs_.dropout.active()) return multiply_backward(weights, part, result, stride, scratch);

  const auto first_lora = std::ranges::find(weights, true, &BackwardTerm::lora);
  const std::span<const BackwardTerm> frozen(weights.begin(), first_lora), loras(first_lora, weights.end());
  multiply_backward(frozen, part, result, stride, scratch);
  auto* product = scratch.take<float>(part.count * stride);
  for (std::size_t i = 0; i < loras.size(); ++i) {  // what was dropped gets no gradient
    multiply_backward(loras.subspan(i, 1), part, product, stride, scratch);
    for (index_t row = 0; row < part.count; ++row) {
      const std::int32_t slot = routing_.slot[static_cast<std::size_t>(part.first + row)];
      drop(inputs_.dropout, loras[i].projection, slot, slice.begin, slice.size(), product + row * stride);
      const std::array<const float*, 2> terms{result + row * stride, product + row * stride};
      constexpr std::array kOnce{1.0f, 1.0f};
      kernels().epilogue.sum_scaled(static_cast<int>(slice.size()), 2, terms.data(), kOnce.data(),
                                    result + row * stride);
    }
  }
}

void Backward::multiply_backward(std::span<const BackwardTerm> weights, Block part, float* result,
                                 index_t stride, Arena& scratch) const {
  std::array<Term, kMostTerms> terms;
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto& [p, lora, frozen, rows, packed, next] = weights[i];
    if (few(part)) {
      const index_t rank = inputs_.of(p).rank();
      const Rows gradient = lora ? by_route(grad_low_rank_[index_of(p)].rows, rank, part, {0, rank})
                                 : grad_output(p, part, {0, experts_.rows(p)});
      if (lora)
        multiply_few(kernels(), gradient, rows, result, stride, /*accumulate=*/i > 0, scratch);
      else
        multiply_few(kernels(), gradient, frozen, result, stride, /*accumulate=*/i > 0, scratch);
    } else {
      const GradInput& gradient = grad_inputs_[index_of(p)][part.index];
      terms[i] = {rows_of(kernels(), lora ? gradient.low_rank : gradient.rows, within(part)), packed,
                  share(next, within(part), blocks_[part.index].count)};
    }
  }
  if (!few(part)) multiply(kernels(), {terms.data(), weights.size()}, result, stride);
}

void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
              const MatView& grad_out, const LayerGradients& gradients) {
  Backward(runtime, experts, inputs, grad_out, gradients).run(saved);
}

}  // namespace kt
