// The numbers that codes stand for before they are scaled, and which of them is nearest; and scales as they
// are stored.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>

#include "base/weight.h"

namespace kt::grids {

// To a whole number, ties to even. Where |x| is 2^22 or more the result is only as large as that.
inline float round_even(float x) {
  constexpr float kWhole = 0x1.8p23f;
  return (x + kWhole) - kWhole;
}

// nearest(x): the closest number, ties to even. code(x): its code. unit(peak): the scale that brings the
// largest weight to the end of the numbers; factors: how much of that scale is tried, because a finer grid
// may be worth a few weights out of range. Where the numbers are as fine at any scale, or the format has a
// rule, there is instead scale_of(peak, global scale), and where there are global scales, global_scale_of(the
// matrix's peak). takes(type): which scales a matrix may have.

template <int N>
struct Integers {  // -N to N - 1; the longer side is for the peak, whatever its sign
  static float nearest(float x) { return std::min(std::max(round_even(x), -float{N}), float{N - 1}); }
  static float unit(float peak) { return peak / -float{N}; }
};

struct Int8 : Integers<128> {
  static bool takes(const WeightType& t) {
    return t.scale == ScaleType::f32 && t.scale_rows == 1 && t.scale_cols % 32 == 0;
  }
  static constexpr std::array factors = {1.0f, 0.97f, 0.94f, 0.91f};
  static std::uint8_t code(float x) { return static_cast<std::uint8_t>(to_int(nearest(x))); }
};

struct Int4 : Integers<8> {
  static bool takes(const WeightType& t) {
    return t.scale == ScaleType::bf16 && t.scale_rows == 1 &&
           (t.scale_cols == 32 || t.scale_cols == 64 || t.scale_cols == 128);
  }
  static constexpr std::array factors = {1.0f,  0.94f, 1.1f,
                                         0.98f, 1.02f, 0.92f};  // normal weights want these
  static std::uint8_t code(float x) { return static_cast<std::uint8_t>(to_int(nearest(x)) + 8); }
};

// Sign, exponent and mantissa. In integers, whose comparisons are vectors.
template <int MantissaBits, int LeastExponent>
struct SmallFloat {
  static constexpr int kShift = 23 - MantissaBits, kSign = std::numeric_limits<std::int32_t>::min();
  static constexpr std::int32_t kLeastNormal = (127 + LeastExponent) << 23;
  static constexpr std::int32_t kBeforeNormal = kLeastNormal - (1 << 23);

  // Of the float with these bits, which is not negative; as bits again.
  static std::int32_t nearest_bits(std::int32_t bits) {
    constexpr float kStep = std::bit_cast<float>(kLeastNormal) / (1 << MantissaBits);  // of denormals
    const float denormal = round_even(std::bit_cast<float>(bits) / kStep) * kStep;
    const std::int32_t normal = (bits + (1 << (kShift - 1)) - 1 + (bits >> kShift & 1)) & -(1 << kShift);
    return bits < kLeastNormal ? std::bit_cast<std::int32_t>(denormal) : normal;
  }
  static float nearest(float x, float largest) {
    const auto bits = std::bit_cast<std::int32_t>(x);
    const std::int32_t magnitude = std::min(bits & ~kSign, std::bit_cast<std::int32_t>(largest));
    return std::bit_cast<float>(nearest_bits(magnitude) | (bits & kSign));
  }
  // Of a number that there is; its sign aside.
  static std::int32_t code_of(float number) {
    constexpr float kSteps = (1 << MantissaBits) / std::bit_cast<float>(kLeastNormal);
    const std::int32_t bits = std::bit_cast<std::int32_t>(number) & ~kSign;
    const auto denormal =
        static_cast<std::int32_t>(std::bit_cast<float>(std::min(bits, kLeastNormal)) * kSteps);
    return bits < kLeastNormal ? denormal : (bits - kBeforeNormal) >> kShift;
  }
};

struct E2M1 : SmallFloat<1, 0> {
  static bool takes(const WeightType& t) { return t == traits_of(Format::mxfp4).quantized; }
  static constexpr std::array factors = {1.0f, 2.0f};
  static float unit(float peak) { return std::ldexp(1.0f, std::ilogb(peak) - 2); }
  static float nearest(float x) { return SmallFloat::nearest(x, 6); }
  static std::uint8_t code(float x) {
    return static_cast<std::uint8_t>(code_of(nearest(x)) | (std::bit_cast<std::int32_t>(x) >> 28 & 8));
  }
};

struct E4M3 : SmallFloat<3, -6> {
  static bool takes(const WeightType& t) {
    return t.scale == ScaleType::f32 &&
           ((t.scale_rows == 1 && t.scale_cols == 0) || (t.scale_rows == 128 && t.scale_cols == 128));
  }
  static constexpr float kLargest = 448;
  static float scale_of(float peak, float) {
    const float scale = peak / kLargest;
    return scale == 0 ? 1 : scale;
  }
  static std::uint8_t code(float x) {
    return static_cast<std::uint8_t>(code_of(nearest(x, kLargest)) |
                                     (std::bit_cast<std::int32_t>(x) >> 24 & 0x80));
  }
};

// ModelOpt's rule: the matrix's peak is the largest number times the largest scale, and each group's peak the
// largest number times its own, rounded.
struct Nvfp4 : E2M1 {
  static constexpr float kLargest = 6;
  static bool takes(const WeightType& t) { return t == traits_of(Format::nvfp4).quantized; }
  static float global_scale_of(float peak) {
    constexpr float kLeast = std::numeric_limits<float>::min();
    return peak == 0 ? 1 : std::max(peak / (kLargest * E4M3::kLargest), kLeast);
  }
  static float scale_of(float peak, float global_scale) {
    constexpr float kLeast = 0x1p-9f;
    const float scale = peak / (kLargest * global_scale);
    return scale == 0 ? 1 : E4M3::nearest(std::max(scale, kLeast), E4M3::kLargest);
  }
};

template <class... Grid>
struct List {};

// By Format, from int8 on: none is quantised to bf16.
using All = List<Int8, Int4, E4M3, E2M1, Nvfp4>;

// What a scale becomes where it is stored.
inline float as_stored(ScaleType type, float scale) {
  switch (type) {
    case ScaleType::bf16: return to_float(to_bf16(scale));
    case ScaleType::e8m0: return std::max(scale, 0x1p-127f);
    case ScaleType::e4m3:  // with a global scale, which is chosen with it
    case ScaleType::none:
    case ScaleType::f32: break;
  }
  return scale;
}

inline void store_scale(const MutableWeight& into, index_t place, float scale) {
  const auto bits = std::bit_cast<std::uint32_t>(scale);
  std::byte* to = into.scales + place * size_of(into.type.scale);
  switch (into.type.scale) {
    case ScaleType::bf16: {
      const auto upper = static_cast<bf16_t>(bits >> 16);
      std::memcpy(to, &upper, sizeof upper);
      break;
    }
    case ScaleType::e8m0: *to = static_cast<std::byte>(bits >> 23); break;
    case ScaleType::e4m3: *to = static_cast<std::byte>(E4M3::code(scale)); break;
    case ScaleType::f32: std::memcpy(to, &bits, sizeof bits); break;
    case ScaleType::none: break;
  }
}

// The first scale whose bits are bad.
template <class Bits, class Bad>
std::optional<index_t> first_bad(const std::byte* scales, index_t count, const Bad& bad) {
  const auto bad_at = [&](index_t i) {
    Bits bits;
    std::memcpy(&bits, scales + i * static_cast<index_t>(sizeof bits), sizeof bits);
    return bad(bits);
  };
  unsigned any = 0;  // first, as vectors
  for (index_t i = 0; i < count; ++i) any |= bad_at(i);
  if (any == 0) return std::nullopt;
  index_t i = 0;
  while (!bad_at(i)) ++i;
  return i;
}

// Whether a float is NaN, infinite or 0, in one comparison: 0 less 1 is more than any.
template <class Bits>
bool bad_float(Bits bits, Bits infinite) {
  constexpr auto kMagnitude = static_cast<Bits>(~Bits{0}) >> 1;
  return static_cast<Bits>((bits & kMagnitude) - 1) >= static_cast<Bits>(infinite - 1);
}

// The place of the first scale that is NaN, infinite or 0; E8M0 and E4M3 are refused for NaN alone, of which
// a block of zeros may have the scale 0.
inline std::optional<index_t> bad_scale(ScaleType type, const std::byte* scales, index_t count) {
  using std::uint16_t, std::uint32_t, std::uint8_t;
  switch (type) {
    case ScaleType::none: break;
    case ScaleType::f32:
      return first_bad<uint32_t>(scales, count, [](uint32_t x) { return bad_float(x, 0x7f800000u); });
    case ScaleType::bf16:
      return first_bad<uint16_t>(scales, count, [](uint16_t x) { return bad_float(x, uint16_t{0x7f80}); });
    case ScaleType::e4m3:
      return first_bad<uint8_t>(scales, count, [](uint8_t x) { return (x & 0x7f) == 0x7f; });
    case ScaleType::e8m0: return first_bad<uint8_t>(scales, count, [](uint8_t x) { return x == 0xff; });
  }
  return std::nullopt;
}

}  // namespace kt::grids
