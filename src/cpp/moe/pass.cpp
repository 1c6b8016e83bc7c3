#include "moe/pass.h"

#include <algorithm>
#include <cstring>

namespace kt {

namespace {

int to_int(index_t n) { return static_cast<int>(n); }  // kernels count rows and columns of a tile in int

}  // namespace

Pass::Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs)
    : lease_(runtime),
      threads_(runtime.threads()),
      experts_(experts),
      inputs_(inputs),
      activation_(kernels_of(kernels(), experts.activation)),
      routing_(route(inputs.topk_ids, experts.num_experts)) {
  for (const int e : routing_.experts)
    for_parts({e, routing_.first(e), routing_.count(e)}, kBlockRows,
              [&](Block block) { blocks_.push_back(block); });
  const auto* weights = static_cast<const float*>(inputs.topk_weights.data);
  for (const std::int32_t slot : routing_.slot) weight_.push_back(weights[slot]);
}

void Pass::project_a(std::initializer_list<Projection> targets, bool weighted) {
  const index_t part_rows = kernels().gemm.nr;
  lease_.parallel_for(std::ssize(blocks_), [&](index_t task, Arena& scratch) {
    const Block block = blocks_[static_cast<std::size_t>(task)];
    for (const Projection p : targets) {
      const LoraPair& lora = inputs_.of(p);
      if (!lora) continue;
      const Arena::Frame frame(scratch);
      const index_t rank = lora.rank(), in = lora.a.cols;
      const PackedA a = pack_a(kernels(), {lora.a[block.expert]}, scratch);
      auto* product = scratch.take<float>(rank * part_rows);
      for_parts(block, part_rows, [&](Block part) {
        const Arena::Frame part_frame(scratch);
        const Term term{a, pack_b_cols(kernels(), lora_input(p, part, {0, in}, scratch), scratch)};
        multiply(kernels(), {&term, 1}, product);
        bf16_t* stored = low_rank_[index_of(p)] + rank * block.first + (part.first - block.first);
        for (index_t i = 0; i < rank; ++i) {
          float* row = product + i * part_rows;
          if (weighted)
            for (index_t j = 0; j < part.count; ++j)
              row[j] *= weight_[static_cast<std::size_t>(part.first + j)];
          kernels().epilogue.round_scaled(to_int(part.count), lora_scale(p), row, stored + i * block.count);
        }
      });
    }
  });
}

void Pass::gate_up(SavedGateUp saved) {
  constexpr std::array kTargets{Projection::gate, Projection::up};
  const index_t n = experts_.intermediate, h = experts_.hidden, part_rows = kernels().gemm.nr;
  const index_t parts = slices(n, kernels().gemm.mr, 2 * h * kernels().gemm.element_bytes);
  lease_.parallel_for(std::ssize(blocks_) * parts, [&](index_t task, Arena& scratch) {
    const Block block = blocks_[static_cast<std::size_t>(task / parts)];
    const Range slice = split(n, parts, task % parts, kernels().gemm.mr);
    const index_t width = slice.size();
    if (width == 0) return;
    std::array<PackedA, 2> weights, lora_b;
    for (const Projection p : kTargets) {
      const LoraPair& lora = inputs_.of(p);
      weights[index_of(p)] =
          pack_a(kernels(), {experts_.of(p)[block.expert].block(slice.begin, 0, width, h)}, scratch);
      if (lora)
        lora_b[index_of(p)] =
            pack_a(kernels(), {lora.b[block.expert].block(slice.begin, 0, width, lora.rank())}, scratch);
    }
    auto* transposed = scratch.take<float>(width * part_rows);
    std::array<float*, 2> result{scratch.take<float>(part_rows * width),
                                 scratch.take<float>(part_rows * width)};
    auto* unsaved = scratch.take<bf16_t>(width);

    for_parts(block, part_rows, [&](Block part) {
      const Arena::Frame frame(scratch);
      const PackedB x = pack_b_cols(kernels(), by_token(inputs_.hidden_states, part, {0, h}), scratch);
      for (const Projection p : kTargets) {
        const std::size_t i = index_of(p);
        std::array<Term, 2> terms{Term{weights[i], x}, Term{}};
        const index_t rank = inputs_.of(p).rank();
        if (rank > 0)
          terms[1] = {lora_b[i],
                      pack_b_rows(kernels(), {low_rank_of(low_rank_[i], rank, block, part)}, scratch)};
        multiply(kernels(), {terms.data(), rank > 0 ? 2u : 1u}, transposed);
        kernels().epilogue.transpose(transposed, part_rows, to_int(width), to_int(part.count), result[i],
                                     width);
      }
      for (index_t i = 0; i < part.count; ++i) {
        const index_t place = (part.first + i) * n + slice.begin;
        activation_.forward(to_int(width), result[0] + i * width, result[1] + i * width,
                            saved.gate ? saved.gate + place : unsaved, saved.up ? saved.up + place : unsaved,
                            hidden_ + place);
      }
    });
  });
}

std::span<const Block> Pass::blocks_of(int expert) const {
  const auto found = std::ranges::equal_range(blocks_, expert, {}, &Block::expert);
  return {found.begin(), found.end()};
}

void Pass::sum_over_experts(Range slice, const Result& result, Arena& scratch,
                            const std::function<void(int expert, float* sum)>& add) const {
  const index_t tokens = inputs_.hidden_states.rows, width = slice.size();
  auto* sum = scratch.take<float>(tokens * width);
  std::fill_n(sum, tokens * width, 0.0f);
  for (const int expert : routing_.experts) {
    const Arena::Frame frame(scratch);
    add(expert, sum);
  }
  for (index_t t = 0; t < tokens; ++t)
    store(sum + t * width, width, result, t * experts_.hidden + slice.begin);
}

Rows Pass::by_token(const MatView& matrix, Block block, Range cols) const {
  return {matrix.block(0, cols.begin, block.count, cols.size()), routing_.token.data() + block.first};
}

Rows Pass::by_route(const bf16_t* matrix, index_t row_length, Block block, Range cols) const {
  return {view(matrix, DType::bf16, routing_.routes(), row_length)
              .block(block.first, cols.begin, block.count, cols.size())};
}

Rows Pass::lora_input(Projection p, Block block, Range cols, Arena& scratch) const {
  const Rows rows = p == Projection::down ? by_route(hidden_, experts_.intermediate, block, cols)
                                          : by_token(inputs_.hidden_states, block, cols);
  return dropped(rows, p, block, cols, scratch);
}

Rows Pass::dropped(Rows rows, Projection p, Block block, Range cols, Arena& scratch) const {
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

MatView Pass::low_rank_of(const bf16_t* low_rank, index_t rank, Block whole, Block part) const {
  return view(low_rank + rank * whole.first, DType::bf16, rank, whole.count)
      .block(0, part.first - whole.first, rank, part.count);
}

index_t Pass::slices(index_t n, index_t tile, index_t bytes, index_t at_least) const {
  const index_t fit = std::max(2 * tile, static_cast<index_t>(lease_.l2_bytes()) / 2 / bytes);
  return std::clamp(std::max(ceil_div(n, fit), at_least), index_t{1}, ceil_div(n, tile));
}

index_t Pass::slices_per_thread(index_t n, index_t tile, index_t bytes) const {
  const index_t parts = slices(n, tile, bytes, threads_);
  return std::min(round_up(parts, threads_), ceil_div(n, tile));
}

void Pass::store(const float* row, index_t n, const Result& result, index_t offset) const {
  if (result.dtype == DType::f32)
    std::memcpy(static_cast<float*>(result.data) + offset, row, static_cast<std::size_t>(n) * sizeof(float));
  else
    kernels().epilogue.round_scaled(to_int(n), 1.0f, row, static_cast<bf16_t*>(result.data) + offset);
}

// Dropped inputs are zeros; the kept ones' factor 1 / (1 - probability) enters here, in fp32.
float Pass::lora_scale(Projection p) const {
  return static_cast<float>(inputs_.of(p).scaling / (1.0 - inputs_.dropout.probability));
}

}  // namespace kt
