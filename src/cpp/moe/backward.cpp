#include "moe/backward.h"

#include <algorithm>

namespace kt {

void Backward::run(SavedGateUp saved) {
  const index_t routes = routing_.routes(), n = experts_.intermediate;
  hidden_ = memory().take<bf16_t>(routes * n);
  grad_gate_up_ = {memory().take<bf16_t>(routes * n), memory().take<bf16_t>(routes * n)};
  for (const Projection p : projections) {
    const std::size_t i = index_of(p);
    low_rank_[i] = take_low_rank(p);
    grad_low_rank_[i] = {take_low_rank(p), take_low_rank(p)};
  }
  project_a({Projection::gate, Projection::up});
  if (saved.gate == nullptr) {
    saved = {memory().take<bf16_t>(routes * n), memory().take<bf16_t>(routes * n)};
    gate_up(saved);
  }
  project_grad_b({Projection::down});
  down(saved);
  project_a({Projection::down}, /*weighted=*/true);
  project_grad_b({Projection::gate, Projection::up});
  input_and_lora();
}

Rows Backward::grad_output(Projection p, Block block, Range cols) const {
  if (p == Projection::down) return by_token(grad_out_, block, cols);
  return by_route(grad_gate_up_[index_of(p)], experts_.intermediate, block, cols);
}

void Backward::down(SavedGateUp saved) {
  const index_t n = experts_.intermediate, h = experts_.hidden, routes = routing_.routes();
  const GemmKernels& gemm = kernels().gemm;
  const index_t parts = slices(n, gemm.nr, h * gemm.element_bytes);
  auto* dots = memory().take<float>(parts * routes);
  std::fill_n(dots, parts * routes, 0.0f);
  lease_.parallel_for(std::ssize(blocks_) * parts, [&](index_t task, Arena& scratch) {
    const Block block = blocks_[static_cast<std::size_t>(task / parts)];
    const Range slice = split(n, parts, task % parts, gemm.nr);
    if (slice.size() == 0) return;
    const Stack& weights = experts_.of(Projection::down);
    const PackedB base =
        pack_b_rows(kernels(), {weights[block.expert].block(0, slice.begin, h, slice.size())}, scratch);
    const std::vector<LoraA> lora = pack_lora_a({Projection::down}, block.expert, slice, scratch);
    const index_t stride = result_stride(kernels(), slice.size());
    auto* grad = scratch.take<float>(rows_per_part() * stride);
    for_parts(block, rows_per_part(), [&](Block part) {
      const Arena::Frame frame(scratch);
      const Term term{pack_a(kernels(), by_token(grad_out_, part, {0, h}), scratch), base};
      input_gradient({&term, 1}, lora, part, slice, grad, scratch);
      for (index_t i = 0; i < part.count; ++i) {
        const index_t route = part.first + i, place = route * n + slice.begin;
        dots[task % parts * routes + route] = activation_.backward(
            static_cast<int>(slice.size()), grad + i * stride, weight_[static_cast<std::size_t>(route)],
            saved.gate + place, saved.up + place, grad_gate_up_[0] + place, grad_gate_up_[1] + place,
            hidden_ + place);
      }
    });
  });
  if (gradients_.topk_weights != nullptr) sum_dots(dots, parts);
}

void Backward::sum_dots(const float* dots, index_t parts) const {
  std::fill_n(gradients_.topk_weights, inputs_.topk_weights.rows * inputs_.topk_weights.cols, 0.0f);
  for (index_t part = 0; part < parts; ++part)
    for (index_t r = 0; r < routing_.routes(); ++r)
      gradients_.topk_weights[routing_.slot[static_cast<std::size_t>(r)]] +=
          dots[part * routing_.routes() + r];
}

void Backward::input_and_lora() {
  const GemmKernels& gemm = kernels().gemm;
  const index_t h = experts_.hidden;
  const index_t parts = gradients_.hidden_states
                            ? slices_per_thread(h, gemm.nr, 2 * experts_.intermediate * gemm.element_bytes)
                            : 0;
  const std::vector<LoraJob> jobs = lora_jobs();
  lease_.parallel_for(parts + std::ssize(jobs), [&](index_t task, Arena& scratch) {
    if (task < parts)
      hidden_states(split(h, parts, task, gemm.nr), scratch);
    else
      lora(jobs[static_cast<std::size_t>(task - parts)], scratch);
  });
}

void Backward::hidden_states(Range slice, Arena& scratch) const {
  sum_over_experts(slice, gradients_.hidden_states, scratch,
                   [&](int expert, float* sum) { add_expert(expert, slice, sum, scratch); });
}

void Backward::add_expert(int expert, Range slice, float* sum, Arena& scratch) const {
  const index_t n = experts_.intermediate, width = slice.size(), stride = result_stride(kernels(), width);
  std::array<PackedB, 2> weights;
  for (const Projection p : {Projection::gate, Projection::up})
    weights[index_of(p)] =
        pack_b_rows(kernels(), {experts_.of(p)[expert].block(0, slice.begin, n, width)}, scratch);
  const std::vector<LoraA> loras = pack_lora_a({Projection::gate, Projection::up}, expert, slice, scratch);
  auto* grad = scratch.take<float>(rows_per_part() * stride);

  for (const Block block : blocks_of(expert))
    for_parts(block, rows_per_part(), [&](Block part) {
      const Arena::Frame part_frame(scratch);
      std::array<Term, 2> terms;
      for (const Projection p : {Projection::gate, Projection::up})
        terms[index_of(p)] = {pack_a(kernels(), grad_output(p, part, {0, n}), scratch), weights[index_of(p)]};
      input_gradient(terms, loras, part, slice, grad, scratch);
      for (index_t row = 0; row < part.count; ++row) {
        const std::int32_t token = routing_.token[static_cast<std::size_t>(part.first + row)];
        kernels().epilogue.add_scaled(static_cast<int>(width), 1.0f, grad + row * stride,
                                      sum + token * width);
      }
    });
}

std::vector<Backward::LoraA> Backward::pack_lora_a(std::initializer_list<Projection> targets, int expert,
                                                   Range slice, Arena& scratch) const {
  std::vector<LoraA> packed;
  for (const Projection p : targets)
    if (const LoraPair& lora = inputs_.of(p); lora)
      packed.push_back(
          {p, pack_b_rows(kernels(), {lora.a[expert].block(0, slice.begin, lora.rank(), slice.size())},
                          scratch)});
  return packed;
}

void Backward::input_gradient(std::span<const Term> base, std::span<const LoraA> loras, Block part,
                              Range slice, float* result, Arena& scratch) const {
  std::vector<Term> terms(base.begin(), base.end());
  for (const LoraA& a : loras) {
    const index_t rank = inputs_.of(a.projection).rank();
    const Rows q = by_route(grad_low_rank_[index_of(a.projection)].rows, rank, part, {0, rank});
    terms.push_back({pack_a(kernels(), q, scratch), a.packed});
  }
  if (!inputs_.dropout.active()) return multiply(kernels(), terms, result);

  multiply(kernels(), base, result);
  const index_t stride = result_stride(kernels(), slice.size());
  auto* product = scratch.take<float>(part.count * stride);
  for (std::size_t i = 0; i < loras.size(); ++i) {  // what was dropped gets no gradient
    multiply(kernels(), {&terms[base.size() + i], 1}, product);
    for (index_t row = 0; row < part.count; ++row) {
      const std::int32_t slot = routing_.slot[static_cast<std::size_t>(part.first + row)];
      drop(inputs_.dropout, loras[i].projection, slot, slice.begin, slice.size(), product + row * stride);
      kernels().epilogue.add_scaled(static_cast<int>(slice.size()), 1.0f, product + row * stride,
                                    result + row * stride);
    }
  }
}

void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, SavedGateUp saved,
              const MatView& grad_out, const LayerGradients& gradients) {
  Backward(runtime, experts, inputs, grad_out, gradients).run(saved);
}

}  // namespace kt
