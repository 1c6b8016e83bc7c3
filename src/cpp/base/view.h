// Element types and the bf16 rounding rule; MatView, a matrix somewhere in memory; and the split rule, how n
// things are cut into contiguous parts: pure functions for loader, layer and loops.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

namespace kt {

using bf16_t = std::uint16_t;  // the upper half of an IEEE float

enum class DType : std::uint8_t { bf16, f16, f32, i32, i64, u8 };

constexpr std::size_t size_of(DType type) {
  switch (type) {
    case DType::bf16:
    case DType::f16: return 2;
    case DType::f32:
    case DType::i32: return 4;
    case DType::i64: return 8;
    case DType::u8: return 1;
  }
  return 0;
}

constexpr std::string_view name_of(DType type) {
  switch (type) {
    case DType::bf16: return "bfloat16";
    case DType::f16: return "float16";
    case DType::f32: return "float32";
    case DType::i32: return "int32";
    case DType::i64: return "int64";
    case DType::u8: return "uint8";
  }
  return "unknown";
}

inline float to_float(bf16_t x) { return std::bit_cast<float>(std::uint32_t{x} << 16); }

// Round to nearest, ties to even; a NaN stays a NaN.
inline bf16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

using index_t = std::int64_t;

// The places of containers, and int, in which kernels count the rows and columns of a tile.
template <class T>
constexpr std::size_t to_size(T n) {
  return static_cast<std::size_t>(n);
}
template <class T>
constexpr int to_int(T n) {
  return static_cast<int>(n);
}

// Owns nothing; the shape travels with the data. rows x cols, row-major, `stride` elements from one row to
// the next (stride >= cols).
struct MatView {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  index_t rows = 0, cols = 0, stride = 0;

  const void* at(index_t row, index_t col) const {
    return static_cast<const char*>(data) + (row * stride + col) * static_cast<index_t>(size_of(dtype));
  }
  MatView block(index_t row, index_t col, index_t n_rows, index_t n_cols) const {
    return {at(row, col), dtype, n_rows, n_cols, stride};
  }
};

inline MatView view(const void* data, DType dtype, index_t rows, index_t cols) {
  return {data, dtype, rows, cols, cols};
}

struct Range {
  index_t begin = 0, end = 0;
  index_t size() const { return end - begin; }
};

constexpr index_t ceil_div(index_t n, index_t d) { return (n + d - 1) / d; }
constexpr index_t round_up(index_t n, index_t d) { return ceil_div(n, d) * d; }

// Part `part` of [0, n) cut into `parts`, every cut on a multiple of `align`. Part sizes differ by at most
// one `align` (the last by what is left); with too few blocks the trailing parts are empty.
constexpr Range split(index_t n, index_t parts, index_t part, index_t align = 1) {
  const index_t blocks = ceil_div(n, align);
  const index_t each = blocks / parts, extra = blocks % parts;
  const index_t first = part * each + std::min(part, extra);
  const index_t last = first + each + (part < extra ? 1 : 0);
  return {std::min(n, first * align), std::min(n, last * align)};
}

// [0, n) cut into a part for each weight, as large as its share of all weights, every cut on a multiple of
// `align`. With too few blocks some parts are empty. The weights are not negative, and their sum is not 0.
inline std::vector<Range> split_by(index_t n, std::span<const index_t> weights, index_t align) {
  const index_t blocks = ceil_div(n, align);
  index_t all = 0, before = 0;
  for (const index_t w : weights) all += w;
  std::vector<Range> parts;
  for (const index_t w : weights) {
    const auto cut = [&](index_t upto) { return std::min(n, (blocks * upto + all / 2) / all * align); };
    parts.push_back({cut(before), cut(before + w)});
    before += w;
  }
  return parts;
}

}  // namespace kt
