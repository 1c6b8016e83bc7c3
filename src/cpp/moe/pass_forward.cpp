// The steps of forward that backward repeats when it recomputes: P, G, U and h.
#include <algorithm>

#include "moe/pass.h"

namespace kt {

void Pass::add_gate_up() {
  std::vector<Slices> slices;
  for (const Portion& shard : shards_)
    slices.push_back(this->slices(shard.inner.size(), kernels().gemm.mr,
                                  2 * experts_.hidden * kernels().gemm.element_bytes));
  hidden_states_.resize(blocks_.size());
  add_with_input(Stage::gate_up, forward_input_bytes(kGateUp, most_rows_, experts_.hidden), slices,
                 {[this](Block block, char* memory, const Group* home, Arena& scratch) {
                    pack_forward_input(kGateUp, block, memory, home, hidden_states_[block.index], scratch);
                  },
                  [this](Block block, index_t, Range slice, Range next, Arena& scratch) {
                    gate_up(block, slice, next, hidden_states_[block.input], scratch);
                  }},
                 gate_up_done_);
}

index_t Pass::forward_input_bytes(std::span<const Projection> targets, index_t routes, index_t cols) const {
  index_t bytes = packed_b_bytes(kernels(), routes, cols);
  for (const Projection p : targets) bytes += packed_b_bytes(kernels(), routes, inputs_.of(p).rank());
  return bytes;
}

void Pass::pack_forward_input(std::span<const Projection> targets, Block block, char* into, const Group* home,
                              ForwardInput& in, Arena& scratch) {
  into = pack_input(targets.front(), block, into, in);
  if (home != nullptr) tasks_.wait(home, scratch);
  for (const Projection p : targets) {
    if (!inputs_.of(p)) continue;
    if (home == nullptr) {
      const Arena::Frame frame(scratch);
      auto* product = scratch.take<float>(product_floats(p, block));
      multiply_a(p, block, in.rows, product, scratch);
      keep_low_rank(p, block, product);
    }
    into = pack_low_rank(p, block, into, in);
  }
}

char* Pass::pack_input(Projection p, Block block, char* into, ForwardInput& in) const {
  const index_t n = cols(p, block);
  if (!few(block)) in.rows = pack_b_cols_into(into, kernels(), input(p, block, {0, n}));
  return into + packed_b_bytes(kernels(), block.count, n);
}

char* Pass::pack_low_rank(Projection p, Block block, char* into, ForwardInput& in) const {
  const index_t rank = inputs_.of(p).rank();
  const MatView low_rank = low_rank_of(low_rank_[index_of(p)], rank, block);
  if (!few(block)) in.low_rank[index_of(p)] = pack_b_rows_into(into, kernels(), {low_rank});
  return into + packed_b_bytes(kernels(), block.count, rank);
}

void Pass::multiply_a(Projection p, Block block, PackedB packed, float* product, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const MatView lora_a = this->lora_a(p, block);
  const index_t rank = lora_a.rows, in = lora_a.cols, stride = result_stride(kernels(), block.count);
  Span span(recorder(scratch), Stage::lora_p);
  span.count({2 * block.count * rank * in, 0, 0});
  const PackedA a = few(block) ? PackedA{} : pack_a(kernels(), {lora_a}, scratch);
  for_parts(block, kernels().gemm.nr, [&](Block part) {
    const Arena::Frame part_frame(scratch);
    float* place = product + within(part).begin;
    if (few(block)) {
      auto* by_row = scratch.take<float>(part.count * rank);
      multiply_few_transposed(kernels(), lora_input(p, part, {0, in}, scratch), {lora_a}, by_row, rank,
                              /*accumulate=*/false, scratch);
      kernels().epilogue.transpose(by_row, rank, to_int(part.count), to_int(rank), place, stride);
    } else {
      const bool as_packed = packed.data != nullptr && !inputs_.dropout.active();
      const PackedB rows = as_packed ? cols_of(kernels(), packed, within(part))
                                     : pack_b_cols(kernels(), lora_input(p, part, {0, in}, scratch), scratch);
      const Term term{a, rows};
      multiply(kernels(), {&term, 1}, place, stride);
    }
  });
}

void Pass::keep_low_rank(Projection p, Block block, float* product) {
  const index_t rank = inputs_.of(p).rank(), stride = result_stride(kernels(), block.count);
  for (index_t i = 0; i < rank; ++i) {
    float* row = product + i * stride;
    const auto keep = [&](const ByBlock& stored) {
      if (!stored.empty())
        kernels().epilogue.round_scaled(to_int(block.count), lora_scale(p), row,
                                        stored[block.index] + i * block.count);
    };
    keep(low_rank_[index_of(p)]);
    if (p != Projection::down) continue;
    for (index_t j = 0; j < block.count; ++j) row[j] *= weight(block.first + j);
    keep(weighted_low_rank_);
  }
}

void Pass::gate_up(Block block, Range slice, Range next, const ForwardInput& in, Arena& scratch) const {
  const index_t n = inner(block), width = slice.size(), part_rows = kernels().gemm.nr;
  const bool saved = !saved_gate_.empty();
  std::array<ForwardWeights, 2> weights;
  std::array<float*, 2> result;
  for (const Projection p : kGateUp) {
    weights[index_of(p)] = forward_weights(p, block, in, slice, next, scratch);
    result[index_of(p)] = scratch.take<float>(part_rows * width);
  }
  const index_t stored = block.count * width * index_t{sizeof(bf16_t)};
  count(scratch, {0, stored, 0});  // h
  if (saved) count(scratch, moved(2 * stored, 0, block.team));
  auto* unsaved =
      scratch.take<bf16_t>(width + 1) + 1;  // off a line, for what fills lines may go past the caches
  for_tiles(block, [&](Block part) {
    for (const Projection p : kGateUp)
      multiply_forward(p, {&weights[index_of(p)], 1}, part, result[index_of(p)], width, scratch);
    const Span span(recorder(scratch), Stage::activation);
    for (index_t i = 0; i < part.count; ++i) {
      const index_t place = (within(part).begin + i) * n + slice.begin;
      activation_.forward(to_int(width), result[0] + i * width, result[1] + i * width,
                          saved ? saved_gate_[block.index] + place : unsaved,
                          saved ? saved_up_[block.index] + place : unsaved, hidden_[block.index] + place);
    }
  });
}

Pass::ForwardWeights Pass::forward_weights(Projection p, Block block, const ForwardInput& in, Range slice,
                                           Range next, Arena& scratch) const {
  const WeightBlock all = weights_of(p, block);
  const bool shared = p == Projection::down;
  ForwardWeights w{};
  w.block = block;
  w.input = &in;
  w.weights = all.rows_of(slice);
  w.next = codes_of(all.rows_of(next));
  w.lora = inputs_.of(p) && (!shared || at_home(block));
  if (const bf16_t* bias = experts_.bias(p, block.expert); bias != nullptr && (!shared || at_home(block)))
    w.bias = bias + first_row(p, block) + slice.begin;
  if (w.lora) w.lora_b = {lora_b(p, block).block(slice.begin, 0, slice.size(), inputs_.of(p).rank())};
  count(scratch, {0, bytes_of(w.weights), 0});
  if (few(block)) return w;
  const Span span(recorder(scratch), packing(w.weights));
  w.packed_weights = pack_a(kernels(), w.weights, scratch);
  if (w.lora) w.packed_lora_b = pack_a(kernels(), w.lora_b, scratch);
  return w;
}

void Pass::multiply_forward(Projection p, std::span<const ForwardWeights> weights, Block part, float* result,
                            index_t stride, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const index_t width = weights.front().weights.rows.size(), part_rows = kernels().gemm.nr;
  for (const ForwardWeights& w : weights)
    count(scratch, {2 * part.count * width * (cols(p, w.block) + (w.lora ? inputs_.of(p).rank() : 0)), 0, 0});
  if (few(part) || part.count <= kernels().few.max_tail) {
    for (const ForwardWeights& w : weights)
      multiply_few_forward(p, w, part, result, stride, /*accumulate=*/&w != weights.data(), scratch);
    return;
  }
  const index_t all = blocks_[part.index].count;
  Range fetching = within(part);  // and for a tail of few rows behind it
  if (all - fetching.end <= kernels().few.max_tail) fetching.end = all;
  const bf16_t* bias = nullptr;  // which the sum starts from
  std::size_t n = 0;
  auto* terms = scratch.take<Term>(2 * std::ssize(weights));
  for (const ForwardWeights& w : weights) {
    const auto add = [&](PackedA a, PackedB b, MatView next) {
      terms[n++] = {a, cols_of(kernels(), b, within(part)), next};
    };
    add(w.packed_weights, w.input->rows, share(w.next, fetching, all));
    if (w.lora) add(w.packed_lora_b, w.input->low_rank[index_of(p)], {});
    if (w.bias != nullptr) bias = w.bias;
  }
  auto* transposed = scratch.take<float>(width * part_rows);
  for (index_t i = 0; bias != nullptr && i < width; ++i)
    std::fill_n(transposed + i * part_rows, part.count, to_float(bias[i]));
  multiply(kernels(), {terms, n}, transposed, part_rows, /*accumulate=*/bias != nullptr);
  kernels().epilogue.transpose(transposed, part_rows, to_int(width), to_int(part.count), result, stride);
}

void Pass::multiply_few_forward(Projection p, const ForwardWeights& w, Block part, float* result,
                                index_t stride, bool accumulate, Arena& scratch) const {
  const Block mine = of_sibling(w.block, part);
  const index_t width = w.weights.rows.size();
  for (index_t i = 0; w.bias != nullptr && i < part.count; ++i)
    for (index_t j = 0; j < width; ++j)
      result[i * stride + j] = to_float(w.bias[j]) + (accumulate ? result[i * stride + j] : 0.0f);
  multiply_few_transposed(kernels(), input(p, mine, {0, cols(p, mine)}), w.weights, result, stride,
                          accumulate || w.bias != nullptr, scratch);
  if (w.lora)
    multiply_few_transposed(kernels(), low_rank_rows(p, mine, scratch), w.lora_b, result, stride,
                            /*accumulate=*/true, scratch);
}

Rows Pass::low_rank_rows(Projection p, Block block, Arena& scratch) const {
  const index_t rank = inputs_.of(p).rank();
  const MatView stored = low_rank_of(low_rank_[index_of(p)], rank, block);
  auto* rows = scratch.take<bf16_t>(block.count * rank);
  for (index_t i = 0; i < rank; ++i)
    for (index_t j = 0; j < block.count; ++j)
      rows[j * rank + i] = *static_cast<const bf16_t*>(stored.at(i, j));
  return {view(rows, DType::bf16, block.count, rank)};
}

}  // namespace kt
