#include "moe/pass.h"

#include <algorithm>
#include <cstring>

namespace kt {

namespace {

constexpr index_t kTasksPerThread = 4;  // at least, where they are small
constexpr index_t kMostSlices = 4;      // of one task: each fetches the next one's weights
constexpr index_t kLeastCols = 24;      // of a slice, or its input is read too often
constexpr index_t kFewCols = 128;       // at least, of a slice for few rows: runs of 256 bytes
constexpr index_t kSumTokens = 64;      // a task of the sum over experts

int to_int(index_t n) { return static_cast<int>(n); }  // kernels count rows and columns of a tile in int

}  // namespace

Pass::Pass(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs)
    : lease_(runtime),
      threads_(runtime.threads()),
      inputs_ahead_(static_cast<std::size_t>(std::max(2, runtime.threads() / 2))),
      inputs_kept_(2 * inputs_ahead_),
      experts_(experts),
      inputs_(inputs),
      activation_(kernels_of(kernels(), experts.activation)),
      routing_(route(inputs.topk_ids, experts.num_experts)) {
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
  const index_t n = experts_.intermediate, h = experts_.hidden;
  struct Memory {
    char* rows;
    std::array<char*, 2> low_rank;
  };
  std::vector<Memory> kept(std::min(blocks_.size(), inputs_kept_));
  for (Memory& m : kept) {
    m.rows = memory().take<char>(packed_b_bytes(kernels(), kBlockRows, h));
    for (const Projection p : kGateUp)
      m.low_rank[index_of(p)] =
          memory().take<char>(packed_b_bytes(kernels(), kBlockRows, inputs_.of(p).rank()));
  }
  hidden_states_.resize(blocks_.size());
  gate_up_done_.resize(blocks_.size());
  std::vector<const Group*> packed(blocks_.size());
  const index_t parts = slices(n, kernels().gemm.mr, 2 * h * kernels().gemm.element_bytes);
  const index_t run = slices_per_task(parts);

  const auto pack = [=, this](std::size_t b, const Memory& into, Arena& scratch) {
    const Block block = blocks_[b];
    ForwardInput& in = hidden_states_[b];
    if (!few(block)) in.rows = pack_b_cols_into(into.rows, kernels(), input(Projection::gate, block, {0, h}));
    for (const Projection p : kGateUp) {
      if (!inputs_.of(p)) continue;
      const std::size_t i = index_of(p);
      project_a(p, block, &in.rows, scratch);
      if (few(block)) continue;
      in.low_rank[i] = pack_b_rows_into(into.low_rank[i], kernels(),
                                        {low_rank_of(low_rank_[i], inputs_.of(p).rank(), block)});
    }
  };
  in_order(
      [&](std::size_t b) {
        packed[b] = tasks_.add(1, [=, this, into = kept[b % inputs_kept_]](index_t, Arena& scratch) {
          if (b >= inputs_kept_) tasks_.wait(gate_up_done_[b - inputs_kept_]);
          pack(b, into, scratch);
        });
      },
      [&](std::size_t b) {
        gate_up_done_[b] =
            tasks_.add(ceil_div(parts, run), [=, this, input = packed[b]](index_t task, Arena& scratch) {
              tasks_.wait(input);
              for_run(task, run, n, parts, kernels().gemm.mr, [&](Range slice, Range next) {
                const Arena::Frame frame(scratch);
                gate_up(blocks_[b], slice, next, hidden_states_[b], saved, scratch);
              });
            });
      });
}

void Pass::project_a(Projection p, Block block, const PackedB* packed, Arena& scratch) {
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
      const bool as_packed = packed != nullptr && !inputs_.dropout.active();
      const PackedB rows = as_packed ? cols_of(kernels(), *packed, within(part))
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
    weights[index_of(p)] = forward_weights(p, block, slice, scratch);
    result[index_of(p)] = scratch.take<float>(part_rows * width);
  }
  auto* unsaved = scratch.take<bf16_t>(width);
  for_tiles(block, [&](Block part) {
    for (const Projection p : kGateUp) {
      const bool first = part.first == block.first;
      const MatView soon = first ? weight_rows(p, block.expert, next).matrix : MatView{};
      multiply_forward(p, weights[index_of(p)], in, part, soon, result[index_of(p)], width, scratch);
    }
    for (index_t i = 0; i < part.count; ++i) {
      const index_t place = (part.first + i) * n + slice.begin;
      activation_.forward(to_int(width), result[0] + i * width, result[1] + i * width,
                          saved.gate ? saved.gate + place : unsaved, saved.up ? saved.up + place : unsaved,
                          hidden_ + place);
    }
  });
}

Pass::ForwardWeights Pass::forward_weights(Projection p, Block block, Range slice, Arena& scratch) const {
  const LoraPair& lora = inputs_.of(p);
  ForwardWeights w{weight_rows(p, block.expert, slice), {}, {}, {}};
  if (lora) w.lora_b = {lora.b[block.expert].block(slice.begin, 0, slice.size(), lora.rank())};
  if (few(block)) return w;
  w.packed_weights = pack_a(kernels(), w.weights, scratch);
  if (lora) w.packed_lora_b = pack_a(kernels(), w.lora_b, scratch);
  return w;
}

void Pass::multiply_forward(Projection p, const ForwardWeights& w, const ForwardInput& in, Block part,
                            const MatView& next, float* result, index_t stride, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const bool lora = static_cast<bool>(inputs_.of(p));
  if (few(part) || part.count <= kernels().few.max_tail) {
    const Rows rows = input(p, part, {0, w.weights.matrix.cols});
    multiply_few_transposed(kernels(), rows, w.weights, result, stride, /*accumulate=*/false, scratch);
    if (lora)
      multiply_few_transposed(kernels(), low_rank_rows(p, part, scratch), w.lora_b, result, stride,
                              /*accumulate=*/true, scratch);
    return;
  }
  const index_t width = w.weights.matrix.rows, part_rows = kernels().gemm.nr;
  std::array<Term, 2> terms{Term{w.packed_weights, cols_of(kernels(), in.rows, within(part))}, Term{}};
  if (lora) terms[1] = {w.packed_lora_b, cols_of(kernels(), in.low_rank[index_of(p)], within(part))};
  auto* transposed = scratch.take<float>(width * part_rows);
  multiply(kernels(), {terms.data(), lora ? 2u : 1u}, transposed, part_rows, /*accumulate=*/false, next);
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

void Pass::add_sum(const Result& result, bool weighted, index_t tile, index_t bytes,
                   const std::vector<const Group*>& ready, Product product) {
  const index_t h = experts_.hidden, tokens = inputs_.hidden_states.rows;
  const index_t parts = slices(h, tile, std::max(bytes, cache_part() / kSumCols));
  const index_t stride = result_stride(kernels(), split(h, parts, 0, tile).size());
  std::array<float*, kSlicesKept> kept;
  for (float*& rows : kept) rows = memory().take<float>(routing_.routes() * stride);

  std::vector<const Group*> sums;
  const auto add_sum_of = [&](std::size_t s, const Group* products) {
    const Range slice = split(h, parts, static_cast<index_t>(s), tile);
    const float* rows = kept[s % kSlicesKept];
    sums.push_back(tasks_.add(ceil_div(tokens, kSumTokens), [=, this](index_t task, Arena& scratch) {
      tasks_.wait(products);
      const index_t first = task * kSumTokens;
      sum_routes({first, std::min(tokens, first + kSumTokens)}, slice, rows, stride, result, weighted,
                 scratch);
    }));
  };
  const Group* last = nullptr;
  for (std::size_t s = 0; s < static_cast<std::size_t>(parts); ++s) {
    const Group* emptied = s >= kSlicesKept ? sums[s - kSlicesKept] : nullptr;
    const Range slice = split(h, parts, static_cast<index_t>(s), tile);
    float* rows = kept[s % kSlicesKept];
    const Group* products = tasks_.add(std::ssize(blocks_), [=, this](index_t b, Arena& scratch) {
      if (emptied != nullptr) tasks_.wait(emptied);
      tasks_.wait(ready[static_cast<std::size_t>(b)]);
      const Block block = blocks_[static_cast<std::size_t>(b)];
      product(block, slice, rows + block.first * stride, stride, scratch);
    });
    if (last != nullptr) add_sum_of(s - 1, last);
    last = products;
  }
  add_sum_of(static_cast<std::size_t>(parts) - 1, last);
}

void Pass::sum_routes(Range tokens, Range slice, const float* rows, index_t stride, const Result& result,
                      bool weighted, Arena& scratch) const {
  const index_t width = slice.size();
  auto* sum = scratch.take<float>(width);
  for (index_t t = tokens.begin; t < tokens.end; ++t) {
    std::fill_n(sum, width, 0.0f);
    const std::int32_t* offset = routing_.token_offset.data() + t;
    for (std::int32_t i = offset[0]; i < offset[1]; ++i) {
      const index_t route = routing_.of_token[static_cast<std::size_t>(i)];
      kernels().epilogue.add_scaled(to_int(width), weighted ? weight(route) : 1.0f, rows + route * stride,
                                    sum);
    }
    store(sum, width, result, t * experts_.hidden + slice.begin);
  }
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

index_t Pass::slices(index_t n, index_t tile, index_t bytes) const {
  const index_t tiles = ceil_div(n, tile), blocks = std::ssize(blocks_);
  if (std::ranges::all_of(blocks_, [this](Block block) { return few(block); }))
    return std::clamp(ceil_div(kTasksPerThread * threads_, std::max(blocks, index_t{1})), index_t{1},
                      ceil_div(n, std::max(tile, kFewCols)));
  return std::clamp(ceil_div(n, std::max(round_up(kLeastCols, tile), cache_part() / bytes)), index_t{1}, tiles);
}

index_t Pass::slices_per_task(index_t parts) const {
  return std::clamp(parts * std::ssize(blocks_) / (kTasksPerThread * threads_), index_t{1}, kMostSlices);
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
