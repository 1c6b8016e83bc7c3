// Element types, the bf16 rounding rule, and MatView: a matrix somewhere in memory.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

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

}  // namespace kt
