// Frozen weights in the precision they are kept in: a matrix (codes, and the scales of blocks of them), and
// those of each expert of a layer. Owns nothing. docs/formats.md has the formats bit by bit.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "base/code_type.h"
#include "base/error.h"
#include "base/view.h"

namespace kt {

// The weight matrices of an expert: three, or without a gate two.
enum class Projection : std::uint8_t { gate, up, down };

inline constexpr std::array projections{Projection::gate, Projection::up, Projection::down};

// Those of an expert, and of these the ones that read X: gate and up.
constexpr std::span<const Projection> projections_of(bool gated) {
  return std::span(projections).last(gated ? 3 : 2);
}
constexpr std::span<const Projection> x_projections_of(bool gated) {
  return projections_of(gated).first(gated ? 2 : 1);
}

// For arrays with one element a projection.
constexpr std::size_t index_of(Projection p) { return to_size(p); }

constexpr std::string_view name_of(Projection p) {
  switch (p) {
    case Projection::gate: return "gate";
    case Projection::up: return "up";
    case Projection::down: return "down";
  }
  return "unknown";
}

enum class Format : std::uint8_t { bf16, int8, int4, fp8, mxfp4, nvfp4 };

// By ScaleType.
inline constexpr std::array<std::string_view, 5> scale_names{"none", "f32", "bf16", "e8m0", "e4m3"};

constexpr std::string_view name_of(ScaleType type) { return scale_names[to_size(type)]; }
constexpr index_t size_of(ScaleType type) { return kScaleBytes[to_size(type)]; }

inline constexpr std::array<std::string_view, kCodeTypes> code_names{"bf16", "int8", "int4", "e4m3", "e2m1"};

constexpr std::string_view name_of(CodeType type) { return code_names[to_size(type)]; }

// What the scales of a matrix are scaled by: one fp32 number, by which each is multiplied or divided.
enum class GlobalScale : std::uint8_t { none, multiplies, divides };

// What matrices of one format may differ in.
struct WeightType {
  Format format = Format::bf16;
  ScaleType scale = ScaleType::none;
  index_t scale_rows = 1, scale_cols = 0;  // of the block that shares a scale; 0: all columns
  bool zero_points = false;                // int4: a byte for each scale; without them the zero point is 8
  GlobalScale global_scale = GlobalScale::none;

  bool operator==(const WeightType&) const = default;
};

// A row says all of a format that is not in its kernels and in the functions that quantise to it
// (weights/quantize.cpp).
struct FormatTraits {
  std::string_view name;
  CodeType codes;
  int bits;              // of a code
  WeightType quantized;  // what weights become that are quantised to it as they are loaded
};

// int8: an fp32 scale for 128 columns, for with one a row the error grows with its length. int4: a bf16 scale
// for 32 columns. fp8: a scale for 128 x 128. mxfp4 and nvfp4: as the formats are, the latter in ModelOpt's
// way.
inline constexpr std::array formats{
    FormatTraits{"bf16", CodeType::bf16, 16, {}},
    FormatTraits{"int8", CodeType::int8, 8, {Format::int8, ScaleType::f32, 1, 128}},
    FormatTraits{"int4", CodeType::int4, 4, {Format::int4, ScaleType::bf16, 1, 32}},
    FormatTraits{"fp8", CodeType::e4m3, 8, {Format::fp8, ScaleType::f32, 128, 128}},
    FormatTraits{"mxfp4", CodeType::e2m1, 4, {Format::mxfp4, ScaleType::e8m0, 1, 32}},
    FormatTraits{
        "nvfp4", CodeType::e2m1, 4, {Format::nvfp4, ScaleType::e4m3, 1, 16, false, GlobalScale::multiplies}},
};

constexpr const FormatTraits& traits_of(Format format) { return formats[to_size(format)]; }
constexpr std::string_view name_of(Format format) { return traits_of(format).name; }

// ValueError for a name that no format has.
inline Format format_from(std::string_view name) {
  const auto at = std::ranges::find(formats, name, &FormatTraits::name);
  if (at != formats.end()) return at->quantized.format;
  throw ValueError(message("format is \"{}\", wanted one of {}", name, joined(formats, &FormatTraits::name)));
}

// Where the parts of a matrix lie, each row-major and dense; a row of codes begins on a byte.
template <class Byte>
struct WeightAt {
  WeightType type;
  index_t rows = 0, cols = 0;
  Byte *codes = nullptr, *scales = nullptr, *zeros = nullptr, *global_scale = nullptr;

  // The columns that share a scale; 1 where there are none.
  index_t group() const {
    return std::max(index_t{1}, type.scale_cols == 0 ? cols : std::min(type.scale_cols, cols));
  }
  index_t scale_count() const {
    return type.scale == ScaleType::none ? 0 : ceil_div(rows, type.scale_rows) * ceil_div(cols, group());
  }
  // Of `n` columns of a row; n is even or the end of the row where two codes share a byte.
  index_t code_bytes(index_t n) const { return ceil_div(n * traits_of(type.format).bits, 8); }
  index_t codes_bytes() const { return rows * code_bytes(cols); }
  index_t scales_bytes() const { return scale_count() * size_of(type.scale); }
  index_t zeros_bytes() const { return type.zero_points ? scale_count() : 0; }
  index_t global_scale_bytes() const { return type.global_scale == GlobalScale::none ? 0 : 4; }
  index_t bytes() const { return codes_bytes() + scales_bytes() + zeros_bytes() + global_scale_bytes(); }

  // The same matrix where take(bytes) puts each of its parts.
  template <class Take>
  WeightAt placed(const Take& take) const {
    const auto part = [&](index_t n) { return n > 0 ? take(n) : nullptr; };
    WeightAt w = *this;
    w.codes = part(codes_bytes());
    w.scales = part(scales_bytes());
    w.zeros = part(zeros_bytes());
    w.global_scale = part(global_scale_bytes());
    return w;
  }
};

using Weight = WeightAt<const std::byte>;
using MutableWeight = WeightAt<std::byte>;

inline Weight frozen(const MutableWeight& w) {
  return {w.type, w.rows, w.cols, w.codes, w.scales, w.zeros, w.global_scale};
}

// The experts of a layer, or of a slice of its intermediate dimension: gate and up are [intermediate,
// hidden], down is [hidden, intermediate], and all matrices of a projection are of one type.
struct LayerShape {
  int num_experts = 0;
  index_t hidden = 0, intermediate = 0;
  std::array<WeightType, projections.size()> types = {};
  bool gated = true;  // else there is no gate

  index_t rows(Projection p) const { return p == Projection::down ? hidden : intermediate; }
  index_t cols(Projection p) const { return p == Projection::down ? intermediate : hidden; }
  // A matrix without memory.
  MutableWeight matrix(Projection p) const { return {types[index_of(p)], rows(p), cols(p)}; }
  // Of the weights and scales of all experts.
  index_t bytes() const {
    index_t bytes = 0;
    for (const Projection p : projections_of(gated)) bytes += num_experts * matrix(p).bytes();
    return bytes;
  }

  bool operator==(const LayerShape&) const = default;
};

}  // namespace kt
