// What the files of this kernel set share: register-level helpers, also for the sets that extend it, and its
// kernels. Static functions only: each set's objects keep their own copy.
#pragma once

#include <immintrin.h>

#include "kernels/generic/groups.h"
#include "kernels/kernel_set.h"

namespace kt {

static inline __mmask16 first16(int n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }
static inline __mmask32 first32(int n) { return n >= 32 ? 0xffffffffu : n <= 0 ? 0 : (1u << n) - 1; }

static inline __m512 widen(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// fp32 to bf16 in the upper half of each lane: nearest even, the lower half arbitrary. Done in integers
// because VCVTNEPS2BF16 flushes denormals. Of NaNs, only the two default ones stay NaN.
static inline __m512i nearest_bf16(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  return _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
}

// The same for every x.
static inline __m512i upper_bf16(__m512 x) {
  const __m512i quiet_nan =
      _mm512_set1_epi32(0x22);  // a table: for either kind of NaN in x, x as a quiet NaN
  return _mm512_castps_si512(_mm512_fixupimm_ps(_mm512_castsi512_ps(nearest_bf16(x)), x, quiet_nan, 0));
}

// The upper halves of the lanes of `low`, then of `high`.
static inline __m512i upper_halves(__m512i low, __m512i high) {
  alignas(64) static const uint16_t kUpper[32] = {1,  3,  5,  7,  9,  11, 13, 15, 17, 19, 21,
                                                  23, 25, 27, 29, 31, 33, 35, 37, 39, 41, 43,
                                                  45, 47, 49, 51, 53, 55, 57, 59, 61, 63};
  return _mm512_permutex2var_epi16(low, _mm512_load_si512(kUpper), high);
}

static inline __m256i round_to_bf16(__m512 x) {
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(upper_bf16(x), 16));
}

static inline __m512i round_to_bf16(__m512 low, __m512 high) {
  return upper_halves(upper_bf16(low), upper_bf16(high));
}

// Lines of 32 codes decoded in registers. Internal linkage.

namespace {

// What columns with one scale share; line(codes) decodes 32 of them, to the bits of DecodeCodes.

struct Int8 {
  __m512 scale;

  KT_INLINE explicit Int8(float all) : scale(_mm512_set1_ps(all)) {}

  KT_INLINE __m512i product(const uint8_t* codes) const {
    const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes));
    return nearest_bf16(_mm512_mul_ps(_mm512_cvtepi32_ps(values), scale));
  }
  KT_INLINE __m512i line(const uint8_t* codes) const {
    return upper_halves(product(codes), product(codes + 16));
  }
};

// Both bytes of a word are the byte that holds its column's code, in the lower bits for even columns.
KT_INLINE static __m512i twofold(const uint8_t* codes) {
  const __m512i four_times = _mm512_setr_epi32(
      0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707,
      0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes)), four_times);
}

// What each of the sixteen codes stands for is rounded once, then looked up. Each byte becomes a pair of
// words, of which bits 1 to 4 choose one of the pairs of equal words in the table.
struct Nibbles {
  __m512i table;

  KT_INLINE Nibbles(const float* values, float zero, float scale) {
    const __m512i upper_twice = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
    const __m512 counts = _mm512_sub_ps(_mm512_load_ps(values), _mm512_set1_ps(zero));
    table = _mm512_shuffle_epi8(nearest_bf16(_mm512_mul_ps(counts, _mm512_set1_ps(scale))), upper_twice);
  }
  KT_INLINE __m512i line(const uint8_t* codes) const {
    const __m512i places = _mm512_srlv_epi16(twofold(codes), _mm512_set1_epi32(3 << 16 | 7));
    return _mm512_permutexvar_epi16(places, table);
  }
};

// Groups of 16 columns: sixteen words for the first, then for the second.
struct HalfNibbles {
  __m512i table;

  KT_INLINE __m512i line(const uint8_t* codes) const {
    const __m512i halves = _mm512_maskz_set1_epi16(0xffff0000, 16);
    constexpr int kAndOr = 0xea;
    const __m512i nibbles = _mm512_srlv_epi16(twofold(codes), _mm512_set1_epi32(4 << 16));
    const __m512i places = _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15), halves, kAndOr);
    return _mm512_permutexvar_epi16(places, table);
  }
};

// A code is sign, exponent (4 bits), mantissa (3). To double a normal product adds 1 to its exponent, so
// sixteen products are enough: those of the codes below 8, which have no leading one, and of exponent 1.
struct Fp8 {
  __m512i table;

  Fp8() = default;
  KT_INLINE explicit Fp8(float scale) {
    const __m512 products = _mm512_mul_ps(_mm512_load_ps(kCounts), _mm512_set1_ps(scale * 0x1p-9f));
    table = _mm512_castsi256_si512(round_to_bf16(products));
  }
  KT_INLINE __m512i line(const uint8_t* codes) const {
    const __m512i nan = _mm512_set1_epi16(0x7f), leading_one = _mm512_set1_epi16(8);
    const __m512i code = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)codes));
    const __m512i magnitude = _mm512_and_si512(code, nan);
    const __m512i mantissa = _mm512_and_si512(code, _mm512_set1_epi16(7));
    const __m512i place = _mm512_min_epu16(magnitude, _mm512_or_si512(mantissa, leading_one));
    const __m512i doublings = _mm512_slli_epi16(_mm512_sub_epi16(magnitude, place), 4);
    const __m512i product = _mm512_add_epi16(_mm512_permutexvar_epi16(place, table), doublings);
    const __m512i sign = _mm512_and_si512(_mm512_slli_epi16(code, 8), _mm512_set1_epi16(-0x8000));
    return _mm512_mask_mov_epi16(_mm512_xor_si512(product, sign), _mm512_cmpeq_epi16_mask(magnitude, nan),
                                 _mm512_set1_epi16(0x7fc0));
  }
};

// A decoder of decode_rows.
template <class Lines>
struct Stored : Lines {
  using Lines::Lines;

  KT_INLINE void operator()(const uint8_t* codes, uint16_t* dst) const {
    _mm512_storeu_si512(dst, Lines::line(codes));
  }
};

}  // namespace

namespace avx512 {

extern const EpilogueKernels epilogue;
extern const DecodeKernels decode;

namespace {

// The vector of the loops in generic/.
struct Vec {
  using Part = __mmask16;
  using Pairs = __mmask32;  // of the bf16 in it
  static constexpr int kSize = 16;
  static constexpr Part kAll = 0xffff;
  static constexpr bool kMasks = true;

  __m512 x;

  static Vec all(float value) { return {_mm512_set1_ps(value)}; }
  static Part first(int n) { return first16(n); }
  static Pairs first_pairs(int n) { return first32(n); }

  // No mask: gcc computes the address of a masked load anew each time.
  static Vec load(const float* src) { return {_mm512_loadu_ps(src)}; }
  static Vec load(const float* src, Part part) { return {_mm512_maskz_loadu_ps(part, src)}; }
  static Vec load_bf16(const uint16_t* src, Part part = kAll) {
    return {widen(_mm256_maskz_loadu_epi16(part, src))};
  }
  static Vec load_pairs(const uint16_t* src, Pairs pairs) {
    return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(pairs, src))};
  }
  static Vec load_f16(const uint16_t* src, Part part = kAll) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(part, src))};
  }

  void store(float* dst) const { _mm512_storeu_ps(dst, x); }
  void store(float* dst, Part part) const { _mm512_mask_storeu_ps(dst, part, x); }
  void store_bf16(uint16_t* dst, Part part = kAll) const {
    _mm256_mask_storeu_epi16(dst, part, round_to_bf16(x));
  }
  static void store_bf16(uint16_t* dst, Vec low, Vec high, Part low_part = kAll, Part high_part = kAll) {
    const __mmask32 mask = low_part | __mmask32{high_part} << 16;
    _mm512_mask_storeu_epi16(dst, mask, round_to_bf16(low.x, high.x));
  }
  // Whole lines go past the caches: G and U are read again only by backward.
  static void stream_bf16(uint16_t* dst, Vec low, Vec high, Part low_part, Part high_part) {
    if ((low_part & high_part) == kAll && reinterpret_cast<uintptr_t>(dst) % 64 == 0)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(dst), round_to_bf16(low.x, high.x));
    else
      store_bf16(dst, low, high, low_part, high_part);
  }

  // Of pairs of bf16: the even elements, and the odd ones.
  Vec even() const { return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 16))}; }
  Vec odd() const {
    return {_mm512_castsi512_ps(_mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0xffff0000)))};
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.x, b.x)}; }
inline Vec mul_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }

// In place: lane j of row i and lane i of row j change places.
inline void transpose_block(Vec (&r)[16]) {
  __m512 t[16];
  for (int i = 0; i < 16; i += 4) {
    const __m512 a = _mm512_unpacklo_ps(r[i].x, r[i + 1].x), b = _mm512_unpackhi_ps(r[i].x, r[i + 1].x);
    const __m512 c = _mm512_unpacklo_ps(r[i + 2].x, r[i + 3].x),
                 d = _mm512_unpackhi_ps(r[i + 2].x, r[i + 3].x);
    t[i] = _mm512_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm512_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm512_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm512_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    const __m512 a = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x88),
                 b = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xdd);
    const __m512 c = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x88),
                 d = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xdd);
    r[i].x = _mm512_shuffle_f32x4(a, c, 0x88);
    r[i + 4].x = _mm512_shuffle_f32x4(b, d, 0x88);
    r[i + 8].x = _mm512_shuffle_f32x4(a, c, 0xdd);
    r[i + 12].x = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
}

}  // namespace

}  // namespace avx512

}  // namespace kt
