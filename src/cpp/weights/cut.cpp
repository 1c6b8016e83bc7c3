#include "weights/cut.h"

#include <cassert>
#include <cstring>
#include <numeric>

#include "gemm/decode.h"

namespace kt {

namespace {

// `rows` times `bytes`, each row `stride` bytes behind the one before, side by side.
void copy_rows(const std::byte* from, index_t stride, index_t rows, index_t bytes, std::byte* to) {
  if (rows == 0 || bytes == 0) return;
  if (stride == bytes) bytes *= rows, rows = 1;
  for (index_t i = 0; i < rows; ++i)
    std::memcpy(to + i * bytes, from + i * stride, static_cast<std::size_t>(bytes));
}

}  // namespace

index_t cut_align(const std::array<WeightType, 3>& types, index_t intermediate) {
  index_t align = 32;
  for (const Projection p : projections) {
    const WeightType& type = types[index_of(p)];
    if (type.scale == ScaleType::none) continue;
    const index_t block = p == Projection::down ? type.scale_cols : type.scale_rows;
    if (block > 0 && block < intermediate) align = std::lcm(align, block);
  }
  return align;
}

void copy_part(const Weight& from, Projection p, Range slice, const MutableWeight& into) {
  const WeightBlock part = p == Projection::down ? whole(from).cols_of(slice) : whole(from).rows_of(slice);
  assert(into.rows == part.rows.size() && into.cols == part.cols.size() && into.type == from.type);
  const MatView codes = codes_of(part);
  copy_rows(static_cast<const std::byte*>(codes.data), codes.stride, codes.rows, codes.cols, into.codes);
  if (into.scale_count() == 0) return;
  const index_t stride = ceil_div(from.cols, from.group()), groups = ceil_div(into.cols, into.group());
  const index_t rows = into.scale_count() / groups;
  const index_t first = part.rows.begin / from.type.scale_rows * stride + part.cols.begin / from.group();
  const auto copy_each = [&](const std::byte* source, index_t size, std::byte* to) {
    copy_rows(source + first * size, stride * size, rows, groups * size, to);
  };
  copy_each(from.scales, size_of(from.type.scale), into.scales);
  if (into.zeros_bytes() > 0) copy_each(from.zeros, 1, into.zeros);
  copy_rows(from.global_scale, into.global_scale_bytes(), 1, into.global_scale_bytes(), into.global_scale);
}

}  // namespace kt
