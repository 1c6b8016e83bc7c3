#include "gemm/decode.h"

#include <cstring>

namespace kt {

namespace {

DecodeCodes* decoder(const KernelSet& kernels, Format format) {
  switch (format) {
    case Format::int8: return kernels.decode.from_int8;
    case Format::int4: return kernels.decode.from_int4;
    case Format::fp8: return kernels.decode.from_fp8;
    case Format::mxfp4: return kernels.decode.from_mxfp4;
    case Format::bf16: break;
  }
  return nullptr;
}

ScaleKind kind_of(ScaleType type) {
  if (type == ScaleType::e8m0) return kScaleE8M0;
  return type == ScaleType::bf16 ? kScaleBF16 : kScaleF32;
}

// Rows that a kernel can take at once: their scales are the same, or a row's length apart; and the first
// column begins a group, or no column behind it does.
void decode_run(DecodeCodes* kernel, const Weight& w, Range rows, Range cols, bf16_t* to, index_t stride) {
  const index_t group = w.group(), groups = ceil_div(w.cols, group), row_bytes = w.code_bytes(w.cols);
  const index_t scale = rows.begin / w.type.scale_rows * groups + cols.begin / group;
  const CodedRows source{
      static_cast<int>(rows.size()),
      static_cast<int>(cols.size()),
      reinterpret_cast<const std::uint8_t*>(w.codes) + rows.begin * row_bytes + w.code_bytes(cols.begin),
      row_bytes,
      kind_of(w.type.scale),
      w.scales + scale * size_of(w.type.scale),
      w.type.scale_rows == 1 ? groups : 0,
      w.zeros == nullptr ? nullptr : reinterpret_cast<const std::uint8_t*>(w.zeros) + scale,
      static_cast<int>(group)};
  kernel(source, to, stride);
}

}  // namespace

MatView codes_of(const WeightBlock& block) {
  const auto& [w, rows, cols] = block;
  const index_t row_bytes = w->code_bytes(w->cols), first = w->code_bytes(cols.begin);
  return {w->codes + rows.begin * row_bytes + first, DType::u8, rows.size(), w->code_bytes(cols.end) - first,
          row_bytes};
}

void decode(const KernelSet& kernels, const WeightBlock& block, bf16_t* to, index_t stride) {
  const auto& [weight, rows, cols] = block;
  const Weight& w = *weight;
  if (block.is_bf16()) {
    const MatView codes = codes_of(block);
    for (index_t i = 0; i < codes.rows; ++i)
      std::memcpy(to + i * stride, codes.at(i, 0), static_cast<std::size_t>(codes.cols));
    return;
  }
  DecodeCodes* kernel = decoder(kernels, w.type.format);
  const index_t group = w.group(), shared = w.type.scale_rows;
  for (index_t row = rows.begin, below; row < rows.end; row = below) {
    below = shared == 1 ? rows.end : std::min(rows.end, (row / shared + 1) * shared);
    for (index_t col = cols.begin, next; col < cols.end; col = next) {
      next = col % group == 0 ? cols.end : std::min(cols.end, round_up(col, group));
      decode_run(kernel, w, {row, below}, {col, next}, to + (row - rows.begin) * stride + col - cols.begin,
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
