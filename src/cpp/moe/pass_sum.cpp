// The part of both passes that adds up products over experts, and stores results in the wanted type.
#include <algorithm>
#include <cstring>

#include "moe/pass.h"

namespace kt {

namespace {

constexpr index_t kSumTokens = 64;   // a task
constexpr index_t kSumCols = 256;    // at most, of a slice: rows of 1 KiB to write and to read again
constexpr index_t kSliceStrips = 4;  // that fill the cache, in a slice: all but the first are fetched early
constexpr index_t kStripTiles = 4;   // at most
constexpr std::size_t kSlicesKept = 3;  // that are computed or wait for their sum at the same time

}  // namespace

void Pass::add_sum(const Result& result, bool weighted, index_t tile, index_t bytes,
                   const std::vector<const Group*>& ready, Product product) {
  const index_t h = experts_.hidden, tokens = inputs_.hidden_states.rows;
  const Slices slices = this->slices(h, tile, std::max(bytes / kSliceStrips, cache_part() / kSumCols));
  const index_t stride = result_stride(kernels(), slices[0].size());
  std::vector<float*> kept(std::min(static_cast<std::size_t>(slices.count), kSlicesKept));
  for (float*& rows : kept) rows = memory().take<float>(routing_.routes() * stride);

  std::vector<const Group*> products, sums;
  const auto add_products = [&](std::size_t s) {
    const Group* emptied = s >= kSlicesKept ? sums[s - kSlicesKept] : nullptr;
    products.push_back(tasks_.add(std::ssize(blocks_), [=, this, rows = kept[s % kSlicesKept],
                                                        slice = slices[static_cast<index_t>(s)]](
                                                           index_t b, Arena& scratch) {
      if (emptied != nullptr) tasks_.wait(emptied);
      tasks_.wait(ready[static_cast<std::size_t>(b)]);
      const Block block = blocks_[static_cast<std::size_t>(b)];
      // Strips begin on multiples of a tile, so what a product writes behind its columns stays in the row
      // and before the next strip. Few rows, which fill no cache, take the slice as it is.
      const index_t fit = std::clamp(cache_part() / bytes, tile, kStripTiles * tile);
      const Slices strips{slice.size(), few(block) ? 1 : ceil_div(slice.size(), fit), tile};
      for_slices(strips, 0, strips.count, [&](index_t, Range strip, Range next) {
        const Arena::Frame frame(scratch);
        const auto cols = [&](Range r) { return Range{slice.begin + r.begin, slice.begin + r.end}; };
        product(block, cols(strip), cols(next), rows + block.first * stride + strip.begin, stride, scratch);
      });
    }));
  };
  const auto add_sums = [&](std::size_t s) {
    sums.push_back(tasks_.add(ceil_div(tokens, kSumTokens),
                              [=, this, made = products[s], rows = kept[s % kSlicesKept],
                               slice = slices[static_cast<index_t>(s)]](index_t task, Arena& scratch) {
                                tasks_.wait(made);
                                const index_t first = task * kSumTokens;
                                sum_routes({first, std::min(tokens, first + kSumTokens)}, slice, rows, stride,
                                           result, weighted, scratch);
                              }));
  };
  // The sum of a slice comes behind the next one's products, so that it seldom waits for its own.
  const auto count = static_cast<std::size_t>(slices.count);
  for (std::size_t s = 0; s <= count; ++s) {
    if (s < count) add_products(s);
    if (s > 0) add_sums(s - 1);
  }
}

void Pass::sum_routes(Range tokens, Range slice, const float* rows, index_t stride, const Result& result,
                      bool weighted, Arena& scratch) const {
  const index_t width = slice.size(), slots = inputs_.topk_weights.cols;
  auto* sum = scratch.take<float>(width);
  auto* scale = scratch.take<float>(slots);
  auto* terms = scratch.take<const float*>(slots);
  for (index_t t = tokens.begin; t < tokens.end; ++t) {
    const std::int32_t* offset = routing_.token_offset.data() + t;
    const int count = offset[1] - offset[0];
    for (int i = 0; i < count; ++i) {
      const index_t route = routing_.of_token[static_cast<std::size_t>(offset[0] + i)];
      scale[i] = weighted ? weight(route) : 1.0f;
      terms[i] = rows + route * stride;
    }
    kernels().epilogue.sum_scaled(static_cast<int>(width), count, terms, scale, sum);
    store(sum, width, result, t * experts_.hidden + slice.begin);
  }
}

void Pass::store(const float* row, index_t n, const Result& result, index_t offset) const {
  if (result.dtype == DType::f32)
    std::memcpy(static_cast<float*>(result.data) + offset, row, static_cast<std::size_t>(n) * sizeof(float));
  else
    kernels().epilogue.round_scaled(static_cast<int>(n), 1.0f, row,
                                    static_cast<bf16_t*>(result.data) + offset);
}

}  // namespace kt
