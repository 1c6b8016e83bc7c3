#include "moe/linear.h"

#include <algorithm>

namespace kt {

namespace {

Stage packing(const WeightBlock& weights) {
  return weights.is_bf16() ? Stage::pack_weights : Stage::decode_weights;
}

// P of a block's rows in natural order, [count, r].
Rows p_rows(const Pass& pass, Projection p, const BlockRows& rows, Arena& scratch) {
  const index_t rank = pass.rank(p);
  const MatView transposed = pass.transposed_rows(pass.p_transposed[index_of(p)], p, rows);
  auto* natural = scratch.take<bf16_t>(rows.count() * rank);
  for (index_t i = 0; i < rank; ++i)
    for (index_t j = 0; j < rows.count(); ++j)
      natural[j * rank + i] = *static_cast<const bf16_t*>(transposed.at(i, j));
  return {view(natural, DType::bf16, rows.count(), rank)};
}

// GEMV: the weights are read once, where they lie.
void gemv_forward(const Pass& pass, Projection p, const ForwardWeights& w, const BlockRows& mc, float* result,
                  index_t stride, bool accumulate, Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const BlockRows rows(w.block, mc.rows);
  const index_t width = w.weights.rows.size();
  for (index_t i = 0; w.bias != nullptr && i < mc.count(); ++i)
    for (index_t j = 0; j < width; ++j)
      result[i * stride + j] = to_float(w.bias[j]) + (accumulate ? result[i * stride + j] : 0.0f);
  gemv_nt(kernels, pass.input(p, rows, {0, pass.cols(p, rows.block)}), w.weights, result, stride,
          accumulate || w.bias != nullptr, scratch);
  if (w.lora)
    gemv_nt(kernels, p_rows(pass, p, rows, scratch), w.lora_b, result, stride,
            /*accumulate=*/true, scratch);
}

}  // namespace

ForwardWeights forward_weights(const Pass& pass, Projection p, const Block& block, const PackedInput& input,
                               Range nc, Range next, Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const WeightBlock all = pass.weight(p, block);
  const bool here = p != Projection::down || pass.plan.is_root(block);
  ForwardWeights w{};
  w.block = block;
  w.input = &input;
  w.weights = all.rows_of(nc);
  w.next = codes_of(all.rows_of(next));
  w.lora = pass.lora(p) && here;
  if (const bf16_t* bias = pass.experts.bias(p, block.expert); bias != nullptr && here)
    w.bias = bias + pass.first_row(p, block) + nc.begin;
  if (w.lora) w.lora_b = {pass.lora_b(p, block).block(nc.begin, 0, nc.size(), pass.rank(p))};
  if (by_gemv(block)) return w;
  const Span span(pass.recorder(scratch), packing(w.weights));
  w.packed_weights = pack_a(kernels, w.weights, scratch);
  if (w.lora) w.packed_lora_b = pack_a(kernels, w.lora_b, scratch);
  return w;
}

void multiply_forward(const Pass& pass, Projection p, std::span<const ForwardWeights> weights,
                      const BlockRows& mc, float* result, index_t stride, Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const Arena::Frame frame(scratch);
  const index_t width = weights.front().weights.rows.size(), nr = kernels.gemm.nr;
  if (by_gemv(mc.block) || mc.count() <= kernels.gemm.max_edge) {
    for (const ForwardWeights& w : weights)
      gemv_forward(pass, p, w, mc, result, stride, /*accumulate=*/&w != weights.data(), scratch);
    return;
  }
  const Range rows = mc.rows;
  const index_t all = mc.block.count;
  // This range's share of the next weights, and behind the last range that of the edge's GEMV.
  Range fetching = rows;
  if (all - fetching.end <= kernels.gemm.max_edge) fetching.end = all;
  const bf16_t* bias = nullptr;  // what the sum starts from
  std::size_t n = 0;
  auto* terms = scratch.take<Term>(2 * std::ssize(weights));
  for (const ForwardWeights& w : weights) {
    terms[n++] = {w.packed_weights, cols_of(kernels, w.input->rows, rows), share(w.next, fetching, all)};
    if (w.lora) terms[n++] = {w.packed_lora_b, cols_of(kernels, w.input->p[index_of(p)], rows), {}};
    if (w.bias != nullptr) bias = w.bias;
  }
  auto* transposed = scratch.take<float>(width * nr);
  for (index_t i = 0; bias != nullptr && i < width; ++i)
    std::fill_n(transposed + i * nr, mc.count(), to_float(bias[i]));
  brgemm(kernels, {terms, n}, transposed, nr, /*accumulate=*/bias != nullptr);
  kernels.epilogue.transpose(transposed, nr, to_int(width), to_int(mc.count()), result, stride);
}

void add_backward_weights(const Pass& pass, std::span<const Projection> targets, const Block& block, Range nc,
                          Range next, BackwardWeights& weights, Arena& scratch) {
  const bool gemv = by_gemv(block);
  const auto packed = [&](const auto& source) {
    return gemv ? PackedB{} : pack_b_rows(pass.kernels(), source, scratch);
  };
  for (const Projection p : targets) {
    const WeightBlock all = pass.weight(p, block), w = all.cols_of(nc);
    const Span span(gemv ? nullptr : pass.recorder(scratch), packing(w));
    weights.push_back({block, p, false, w, {}, packed(w), codes_of(all.cols_of(next))});
  }
  for (const Projection p : targets)
    if (pass.lora(p) && (p == Projection::down || pass.plan.is_root(block))) {
      const Rows a{pass.lora_a(p, block).block(0, nc.begin, pass.rank(p), nc.size())};
      weights.push_back({block, p, true, {}, a, packed(a), {} /* it is small */});
    }
}

namespace {

// The sum without regard to dropout.
void sum_of_products(const Pass& pass, std::span<const BackwardTerm> weights, const BlockRows& mc,
                     float* result, index_t stride, Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const Arena::Frame frame(scratch);
  const Range within = mc.rows;
  auto* terms = scratch.take<Term>(std::ssize(weights));
  for (std::size_t i = 0; i < weights.size(); ++i) {
    const auto& [block, p, lora, frozen, lora_a, packed, next] = weights[i];
    if (by_gemv(mc.block)) {
      const BlockRows rows(block, mc.rows);
      const index_t rank = pass.rank(p);
      if (lora)
        gemv_nn(kernels, pass.by_route(pass.lora_q[index_of(p)], rank, rows, {0, rank}), lora_a, result,
                stride, /*accumulate=*/i > 0, scratch);
      else
        gemv_nn(kernels, pass.grad_output(p, rows, {0, pass.rows(p, rows.block)}), frozen, result, stride,
                /*accumulate=*/i > 0, scratch);
    } else {
      // dG and dU are packed by each shard, dOut once for all shards of a node.
      const std::size_t packer = p == Projection::down ? block.packer : block.index;
      const PackedGradient& gradient = pass.packed_grad[index_of(p)][packer];
      terms[i] = {rows_of(kernels, lora ? gradient.q : gradient.rows, within), packed,
                  share(next, within, mc.block.count)};
    }
  }
  if (!by_gemv(mc.block)) brgemm(kernels, {terms, weights.size()}, result, stride);
}

}  // namespace

void multiply_backward(const Pass& pass, const BackwardWeights& weights, const BlockRows& mc, Range nc,
                       float* result, index_t stride, Arena& scratch) {
  if (!pass.inputs.dropout.active()) return sum_of_products(pass, weights, mc, result, stride, scratch);

  BackwardWeights frozen, loras;
  for (const BackwardTerm& term : weights) (term.lora ? loras : frozen).push_back(term);
  sum_of_products(pass, frozen, mc, result, stride, scratch);
  auto* product = scratch.take<float>(mc.count() * stride);
  for (const BackwardTerm& term : loras) {
    sum_of_products(pass, {&term, 1}, mc, product, stride, scratch);
    for (index_t row = 0; row < mc.count(); ++row) {
      const std::int32_t slot = pass.routing.sorted_slots[to_size(mc.first() + row)];
      drop(pass.inputs.dropout, term.projection, slot, pass.first_col(term.projection, mc.block) + nc.begin,
           nc.size(), product + row * stride);
      const std::array<const float*, 2> terms{result + row * stride, product + row * stride};
      constexpr std::array kOnce{1.0f, 1.0f};
      pass.kernels().epilogue.sum_scaled(to_int(nc.size()), 2, terms.data(), kOnce.data(),
                                         result + row * stride);
    }
  }
}

}  // namespace kt
