#include "moe/pass.h"

#include <algorithm>
#include <cstring>

namespace kt {

namespace {

constexpr index_t kTasksPerThread = 4;  // at least, where they are small
constexpr index_t kMostSlices = 4;      // of one task: each fetches the next one's weights
constexpr index_t kLeastCols = 24;      // of a slice, or its input is read too often
constexpr index_t kFewCols = 128;       // at least, of a slice for few rows: runs of 256 bytes

int to_int(index_t n) { return static_cast<int>(n); }  // kernels count rows and columns of a tile in int

}  // namespace

Pass::Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs)
    : lease_(runtime),
      threads_(runtime.threads()),
      inputs_ahead_(static_cast<std::size_t>(std::max(2, runtime.threads() / 2))),
      experts_(experts),
      inputs_(inputs),
      activation_(kernels_of(kernels(), experts.activation)),
      routing_(route(inputs.topk_ids, experts.num_experts)) {
  if (experts.fetch)
    tasks_.add(std::ssize(routing_.experts),
               [this](index_t i, Arena&) { experts_.fetch(routing_.experts[static_cast<std::size_t>(i)]); });
  for (const int e : routing_.experts) {
    const index_t count = routing_.count(e), blocks = ceil_div(count, kBlockRows);
    const index_t each = round_up(ceil_div(count, blocks), kernels().gemm.nr);
    for_parts({e, 0, routing_.first(e), count}, each, [&](Block block) {
      block.index = blocks_.size();
      blocks_.push_back(block);
    });
  }
  const auto* weights = static_cast<const float*>(inputs.topk_weights.data);
  for (const std::int32_t slot : routing_.slot) weight_.push_back(weights[slot]);
}

void Pass::add_gate_up(const Saved& saved) {
  const index_t h = experts_.hidden;
  const Slices slices =
      this->slices(experts_.intermediate, kernels().gemm.mr, 2 * h * kernels().gemm.element_bytes);
  hidden_states_.resize(blocks_.size());
  add_with_input(
      forward_input_bytes(kGateUp, kBlockRows),
      [this](Block block, char* memory, Arena& scratch) {
        pack_forward_input(kGateUp, block, memory, hidden_states_[block.index], scratch);
      },
      slices,
      [=, this](Block block, index_t, Range slice, Range next, Arena& scratch) {
        gate_up(block, slice, next, hidden_states_[block.index], saved, scratch);
      },
      gate_up_done_);
}

index_t Pass::forward_input_bytes(std::span<const Projection> targets, index_t routes) const {
  index_t bytes = packed_b_bytes(kernels(), routes, experts_.cols(targets.front()));
  for (const Projection p : targets) bytes += packed_b_bytes(kernels(), routes, inputs_.of(p).rank());
  return bytes;
}

void Pass::pack_forward_input(std::span<const Projection> targets, Block block, char* into, ForwardInput& in,
                              Arena& scratch) {
  const Projection first = targets.front();
  const index_t cols = experts_.cols(first);
  if (!few(block)) in.rows = pack_b_cols_into(into, kernels(), input(first, block, {0, cols}));
  into += packed_b_bytes(kernels(), block.count, cols);
  for (const Projection p : targets) {
    const index_t rank = inputs_.of(p).rank();
    if (rank == 0) continue;
    project_a(p, block, in.rows, scratch);
    if (few(block)) continue;
    const std::size_t i = index_of(p);
    in.low_rank[i] = pack_b_rows_into(into, kernels(), {low_rank_of(low_rank_[i], rank, block)});
    into += packed_b_bytes(kernels(), block.count, rank);
  }
}

void Pass::project_a(Projection p, Block block, PackedB packed, Arena& scratch) {
  const Arena::Frame frame(scratch);
  const LoraPair& lora = inputs_.of(p);
  const index_t rank = lora.rank(), in = lora.a.cols, part_rows = kernels().gemm.nr;
  const PackedA a = few(block) ? PackedA{} : pack_a(kernels(), {lora.a[block.expert]}, scratch);
  auto* product = scratch.take<float>(rank * part_rows);
  for_parts(block, part_rows, [&](Block part) {
    const Arena::Frame part_frame(scratch);
    if (few(block)) {
      auto* by_row = scratch.take<float>(part.count * rank);
      multiply_few_transposed(kernels(), lora_input(p, part, {0, in}, scratch), {lora.a[block.expert]},
                              by_row, rank, /*accumulate=*/false, scratch);
      kernels().epilogue.transpose(by_row, rank, to_int(part.count), to_int(rank), product, part_rows);
    } else {
      const bool as_packed = packed.data != nullptr && !inputs_.dropout.active();
      const PackedB rows = as_packed ? cols_of(kernels(), packed, within(part))
                                     : pack_b_cols(kernels(), lora_input(p, part, {0, in}, scratch), scratch);
      const Term term{a, rows};
      multiply(kernels(), {&term, 1}, product, part_rows);
    }
    const index_t place = rank * block.first + within(part).begin;
    for (index_t i = 0; i < rank; ++i) {
      float* row = product + i * part_rows;
      const auto keep = [&](bf16_t* stored) {
        kernels().epilogue.round_scaled(to_int(part.count), lora_scale(p), row,
                                        stored + place + i * block.count);
      };
      if (low_rank_[index_of(p)] != nullptr) keep(low_rank_[index_of(p)]);
      if (p != Projection::down || weighted_low_rank_ == nullptr) continue;
      for (index_t j = 0; j < part.count; ++j) row[j] *= weight(part.first + j);
      keep(weighted_low_rank_);
    }
  });
}

void Pass::gate_up(Block block, Range slice, Range next, const ForwardInput& in, const Saved& saved,
                   Arena& scratch) const {
  const index_t n = experts_.intermediate, width = slice.size(), part_rows = kernels().gemm.nr;
  std::array<ForwardWeights, 2> weights;
  std::array<float*, 2> result;
  for (const Projection p : kGateUp) {
    weights[index_of(p)] = forward_weights(p, block, slice, next, scratch);
    result[index_of(p)] = scratch.take<float>(part_rows * width);
  }
  auto* unsaved =
      scratch.take<bf16_t>(width + 1) + 1;  // off a line, for what fills lines may go past the caches
  for_tiles(block, [&](Block part) {
    for (const Projection p : kGateUp)
      multiply_forward(p, weights[index_of(p)], in, part, result[index_of(p)], width, scratch);
    for (index_t i = 0; i < part.count; ++i) {
      const index_t place = (part.first + i) * n + slice.begin;
      activation_.forward(to_int(width), result[0] + i * width, result[1] + i * width,
                          saved.gate ? saved.gate + place : unsaved, saved.up ? saved.up + place : unsaved,
                          hidden_ + place);
    }
  });
}

Pass::ForwardWeights Pass::forward_weights(Projection p, Block block, Range slice, Range next,
                                           Arena& scratch) const {
  const LoraPair& lora = inputs_.of(p);
  ForwardWeights w{};
  w.weights = weight_rows(p, block.expert, slice);
  w.next = codes_of(weight_rows(p, block.expert, next));
  if (const bf16_t* bias = experts_.bias(p, block.expert); bias != nullptr) w.bias = bias + slice.begin;
  if (lora) w.lora_b = {lora.b[block.expert].block(slice.begin, 0, slice.size(), lora.rank())};
  if (few(block)) return w;
  w.packed_weights = pack_a(kernels(), w.weights, scratch);
  if (lora) w.packed_lora_b = pack_a(kernels(), w.lora_b, scratch);
  return w;
}

void Pass::multiply_forward(Projection p, const ForwardWeights& w, const ForwardInput& in, Block part,
                            float* result, index_t stride, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const bool lora = static_cast<bool>(inputs_.of(p)), bias = w.bias != nullptr;  // which the sum starts from
  const index_t width = w.weights.rows.size(), part_rows = kernels().gemm.nr;
  if (few(part) || part.count <= kernels().few.max_tail) {
    const Rows rows = input(p, part, {0, experts_.cols(p)});
    for (index_t i = 0; bias && i < part.count; ++i)
      std::transform(w.bias, w.bias + width, result + i * stride, to_float);
    multiply_few_transposed(kernels(), rows, w.weights, result, stride, /*accumulate=*/bias, scratch);
    if (lora)
      multiply_few_transposed(kernels(), low_rank_rows(p, part, scratch), w.lora_b, result, stride,
                              /*accumulate=*/true, scratch);
    return;
  }
  const index_t whole = blocks_[part.index].count;
  Range fetching = within(part);  // and for a tail of few rows behind it
  if (whole - fetching.end <= kernels().few.max_tail) fetching.end = whole;
  std::array<Term, 2> terms;
  terms[0] = {w.packed_weights, cols_of(kernels(), in.rows, within(part)), share(w.next, fetching, whole)};
  if (lora) terms[1] = {w.packed_lora_b, cols_of(kernels(), in.low_rank[index_of(p)], within(part))};
  auto* transposed = scratch.take<float>(width * part_rows);
  for (index_t i = 0; bias && i < width; ++i)
    std::fill_n(transposed + i * part_rows, part.count, to_float(w.bias[i]));
  multiply(kernels(), {terms.data(), lora ? 2u : 1u}, transposed, part_rows, /*accumulate=*/bias);
  kernels().epilogue.transpose(transposed, part_rows, to_int(width), to_int(part.count), result, stride);
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

Rows Pass::by_token(const MatView& matrix, Block block, Range cols) const {
  return {matrix.block(0, cols.begin, block.count, cols.size()), routing_.token.data() + block.first};
}

Rows Pass::by_route(const bf16_t* matrix, index_t row_length, Block block, Range cols) const {
  return {view(matrix, DType::bf16, routing_.routes(), row_length)
              .block(block.first, cols.begin, block.count, cols.size())};
}

Rows Pass::input(Projection p, Block block, Range cols) const {
  return p == Projection::down ? by_route(hidden_, experts_.intermediate, block, cols)
                               : by_token(inputs_.hidden_states, block, cols);
}

Rows Pass::lora_input(Projection p, Block block, Range cols, Arena& scratch) const {
  const Rows rows = input(p, block, cols);
  if (!inputs_.dropout.active()) return rows;
  auto* copy = scratch.take<bf16_t>(block.count * cols.size());
  for (index_t i = 0; i < block.count; ++i) {
    bf16_t* row = copy + i * cols.size();
    const index_t source = rows.index ? rows.index[i] : i;
    std::memcpy(row, rows.matrix.at(source, 0), static_cast<std::size_t>(cols.size()) * sizeof(bf16_t));
    drop(inputs_.dropout, p, routing_.slot[static_cast<std::size_t>(block.first + i)], cols.begin,
         cols.size(), row);
  }
  return {view(copy, DType::bf16, block.count, cols.size())};
}

MatView Pass::low_rank_of(const bf16_t* low_rank, index_t rank, Block part) const {
  const Block& whole = blocks_[part.index];
  return view(low_rank + rank * whole.first, DType::bf16, rank, whole.count)
      .block(0, within(part).begin, rank, part.count);
}

Slices Pass::slices(index_t n, index_t tile, index_t bytes) const {
  const auto cut = [&](index_t count, index_t most) {
    return Slices{n, std::clamp(count, index_t{1}, most), tile};
  };
  if (all_few())
    return cut(ceil_div(kTasksPerThread * threads_, std::max(std::ssize(blocks_), index_t{1})),
               ceil_div(n, std::max(tile, kFewCols)));
  return cut(ceil_div(n, std::max(round_up(kLeastCols, tile), cache_part() / bytes)), ceil_div(n, tile));
}

index_t Pass::slices_per_task(const Slices& slices) const {
  return std::clamp(slices.count * std::ssize(blocks_) / (kTasksPerThread * threads_), index_t{1},
                    kMostSlices);
}

// Dropped inputs are zeros; the kept ones' factor 1 / (1 - probability) enters here, in fp32.
float Pass::lora_scale(Projection p) const {
  return static_cast<float>(inputs_.of(p).scaling / (1.0 - inputs_.dropout.probability));
}

}  // namespace kt
