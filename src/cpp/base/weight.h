// A matrix of frozen weights in the precision it is kept in: codes, and the scales of blocks of them.
// Owns nothing. docs/formats.md has the formats bit by bit.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "base/error.h"
#include "base/split.h"
#include "base/view.h"

namespace kt {

// bf16: no scales. int8: two's complement. int4: two codes a byte, the lower bits first, each minus its zero
// point. fp8: E4M3, no infinities. mxfp4: E2M1, two a byte as in int4, scales E8M0.
enum class Format : std::uint8_t { bf16, int8, int4, fp8, mxfp4 };

inline constexpr std::array<std::string_view, 5> format_names{"bf16", "int8", "int4", "fp8", "mxfp4"};

constexpr std::string_view name_of(Format format) { return format_names[static_cast<std::size_t>(format)]; }

inline Format format_from(std::string_view name) {
  const auto at = std::find(format_names.begin(), format_names.end(), name);
  KT_CHECK(at != format_names.end(), "format is \"{}\", wanted bf16, int8, int4, fp8 or mxfp4", name);
  return static_cast<Format>(at - format_names.begin());
}

enum class ScaleType : std::uint8_t { none, f32, bf16, e8m0 };

constexpr std::string_view name_of(ScaleType type) {
  constexpr std::array<std::string_view, 4> names{"none", "f32", "bf16", "e8m0"};
  return names[static_cast<std::size_t>(type)];
}

constexpr index_t size_of(ScaleType type) {
  constexpr index_t sizes[] = {0, 4, 2, 1};
  return sizes[static_cast<std::size_t>(type)];
}

// What matrices of one format may differ in.
struct WeightType {
  Format format = Format::bf16;
  ScaleType scale = ScaleType::none;
  index_t scale_rows = 1, scale_cols = 0;  // of the block that shares a scale; 0: all columns
  bool zero_points = false;                // int4: a byte for each scale; without them the zero point is 8

  bool operator==(const WeightType&) const = default;
};

// Where the parts of a matrix lie, each row-major and dense; a row of codes begins on a byte.
template <class Byte>
struct WeightAt {
  WeightType type;
  index_t rows = 0, cols = 0;
  Byte *codes = nullptr, *scales = nullptr, *zeros = nullptr;

  // The columns that share a scale; 1 where there are none.
  index_t group() const {
    return std::max(index_t{1}, type.scale_cols == 0 ? cols : std::min(type.scale_cols, cols));
  }
  index_t scale_count() const {
    return type.scale == ScaleType::none ? 0 : ceil_div(rows, type.scale_rows) * ceil_div(cols, group());
  }
  // Of `n` columns of a row; n is even or the end of the row where two codes share a byte.
  index_t code_bytes(index_t n) const {
    switch (type.format) {
      case Format::bf16: return 2 * n;
      case Format::int8:
      case Format::fp8: return n;
      case Format::int4:
      case Format::mxfp4: return ceil_div(n, 2);
    }
    return 0;
  }
  index_t codes_bytes() const { return rows * code_bytes(cols); }
  index_t scales_bytes() const { return scale_count() * size_of(type.scale); }
  index_t zeros_bytes() const { return type.zero_points ? scale_count() : 0; }
  index_t bytes() const { return codes_bytes() + scales_bytes() + zeros_bytes(); }
};

using Weight = WeightAt<const std::byte>;
using MutableWeight = WeightAt<std::byte>;

inline Weight frozen(const MutableWeight& w) { return {w.type, w.rows, w.cols, w.codes, w.scales, w.zeros}; }

}  // namespace kt
