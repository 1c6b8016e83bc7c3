#include "gemm/decode.h"

#include <cassert>
#include <cstring>

namespace kt {

MatView codes_of(const WeightBlock& block) {
  const auto& [w, rows, cols] = block;
  const index_t row_bytes = w->code_bytes(w->cols), first = w->code_bytes(cols.begin);
  return {w->codes + rows.begin * row_bytes + first, DType::u8, rows.size(), w->code_bytes(cols.end) - first,
          row_bytes};
}

bool is_run(const WeightBlock& block) {
  const auto& [w, rows, cols] = block;
  const index_t group = w->group(), shared = w->type.scale_rows;
  return (shared == 1 || rows.begin / shared == (rows.end - 1) / shared) &&
         (cols.begin % group == 0 || cols.begin / group == (cols.end - 1) / group);
}

CodedRows coded(const WeightBlock& run) {
  assert(is_run(run));
  const Weight& w = *run.weight;
  const MatView codes = codes_of(run);
  const index_t group = w.group(), groups = ceil_div(w.cols, group);
  const index_t scale = run.rows.begin / w.type.scale_rows * groups + run.cols.begin / group;
  float global_scale = 1;
  if (w.global_scale != nullptr) std::memcpy(&global_scale, w.global_scale, sizeof global_scale);
  return {to_int(run.rows.size()),
          to_int(run.cols.size()),
          static_cast<const std::uint8_t*>(codes.data),
          codes.stride,
          w.type.scale,
          w.scales + scale * size_of(w.type.scale),
          w.type.scale_rows == 1 ? groups : 0,
          w.zeros == nullptr ? nullptr : reinterpret_cast<const std::uint8_t*>(w.zeros) + scale,
          to_int(group),
          global_scale,
          w.type.global_scale == GlobalScale::divides};
}

void decode(const KernelSet& kernels, const WeightBlock& block, bf16_t* to, index_t stride) {
  const auto& [weight, rows, cols] = block;
  const Weight& w = *weight;
  if (block.is_bf16()) {
    const MatView codes = codes_of(block);
    for (index_t i = 0; i < codes.rows; ++i)
      std::memcpy(to + i * stride, codes.at(i, 0), to_size(codes.cols));
    return;
  }
  DecodeCodes* kernel = kernels.decode.from_codes[to_int(traits_of(w.type.format).codes)];
  const index_t group = w.group(), shared = w.type.scale_rows;
  for (index_t row = rows.begin, below; row < rows.end; row = below) {
    below = shared == 1 ? rows.end : std::min(rows.end, (row / shared + 1) * shared);
    for (index_t col = cols.begin, next; col < cols.end; col = next) {
      next = col % group == 0 ? cols.end : std::min(cols.end, round_up(col, group));
      kernel(coded({weight, {row, below}, {col, next}}), to + (row - rows.begin) * stride + col - cols.begin,
             stride);
    }
  }
}

MatView in_bf16(const KernelSet& kernels, const WeightBlock& block, Arena& scratch) {
  const auto& [w, rows, cols] = block;
  if (block.is_bf16())
    return view(w->codes, DType::bf16, w->rows, w->cols)
        .block(rows.begin, cols.begin, rows.size(), cols.size());
  auto* decoded = scratch.take<bf16_t>(rows.size() * cols.size());
  decode(kernels, block, decoded, cols.size());
  return view(decoded, DType::bf16, rows.size(), cols.size());
}

}  // namespace kt
