// The types of codes and scales as GEMVs read them, a line of 32 columns at a time and in registers. Each has
// `lines` for columns of one row whose scale, or kScales scales, begin at a place, and `pair` for those of an
// even and an odd row, whose lines are interleaved for VDPBF16PS. Scales are ordinary. Internal linkage.
#pragma once

#include "kernels/avx512_bf16/set.h"
#include "kernels/generic/groups.h"

namespace kt::avx512_bf16 {

namespace {

// Pairs of bf16 along k.
struct GemvTraits : avx512::GemvTuning {
  using Vec = avx512::Vec;
  using Run = __m512bh;
  using Terms = __m512i;
  static constexpr int kRunBytes = 64, kRows = 2, kUnaided = 2;

  static Run load(const uint16_t* w, __mmask32 mask) { return (__m512bh)_mm512_maskz_loadu_epi16(mask, w); }
  static Vec dot(Run w, const char* x, Vec c) {
    return {_mm512_dpbf16_ps(c.x, w, (__m512bh)_mm512_load_si512(x))};
  }
  static void keep(const uint16_t* from, __mmask32 mask, char* to) {
    _mm512_store_si512(to, _mm512_maskz_loadu_epi16(mask, from));
  }

  static void load_across(const uint16_t* w, ptrdiff_t to_odd, __mmask32 even_mask, __mmask32 odd_mask,
                          __m512i* b) {
    const __m512i even = _mm512_maskz_loadu_epi16(even_mask, w);
    const __m512i odd = _mm512_maskz_loadu_epi16(odd_mask, w + to_odd);
    b[0] = _mm512_unpacklo_epi16(even, odd);
    b[1] = _mm512_unpackhi_epi16(even, odd);
  }
  static Terms broadcast(uint32_t term) { return _mm512_set1_epi32(static_cast<int>(term)); }
  static Vec multiply_add(Terms x, Terms w, Vec c) {
    return {_mm512_dpbf16_ps(c.x, (__m512bh)x, (__m512bh)w)};
  }
  static void keep_terms(const uint16_t* x, int rows, uint32_t* to, int stride) {
    for (int p = 0; p < rows; p += 2, to += stride)
      *to = x[p] | (p + 1 < rows ? uint32_t{x[p + 1]} << 16 : 0);
  }
  // Unpacking interleaves within 128 bits: the first half has columns 0-3, 8-11, ...
  static void in_order(Vec (&half)[2]) {
    interleave(half, _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23));
  }
};

constexpr int kScaleValues = 128;  // of e4m3, without negative ones

// W, and what each of its scales stands for if they are e4m3.
struct Coded : CodedRows {
  const float* scale_values;
};

// Whether any of n scales, at most a register full, is not between 2^-100 and 2^100 in magnitude, or of e4m3
// ones NaN or negative. Exponents lie in the upper byte when the sign is shifted out.
inline bool any_extreme(ScaleType type, const void* scales, ptrdiff_t place, int n) {
  switch (type) {
    case ScaleType::f32: {
      const __m512i bits = _mm512_maskz_loadu_epi32(first16(n), (const uint32_t*)scales + place);
      const __m512i above = _mm512_sub_epi32(_mm512_slli_epi32(bits, 1), _mm512_set1_epi32(27 << 24));
      return _mm512_mask_cmpgt_epu32_mask(first16(n), above, _mm512_set1_epi32(200 << 24)) != 0;
    }
    case ScaleType::bf16: {
      const __m512i bits = _mm512_maskz_loadu_epi16(first32(n), (const uint16_t*)scales + place);
      const __m512i above = _mm512_sub_epi16(_mm512_slli_epi16(bits, 1), _mm512_set1_epi16(27 << 8));
      return _mm512_mask_cmpgt_epu16_mask(first32(n), above,
                                          _mm512_set1_epi16(static_cast<short>(200 << 8))) != 0;
    }
    case ScaleType::e8m0:
    case ScaleType::e4m3: {
      const __mmask64 mask = n >= 64 ? ~0ull : (1ull << n) - 1;
      const __m512i bits = _mm512_maskz_loadu_epi8(mask, (const uint8_t*)scales + place);
      if (type == ScaleType::e4m3) return _mm512_cmpge_epu8_mask(bits, _mm512_set1_epi8(0x7f)) != 0;
      const __m512i above = _mm512_sub_epi8(bits, _mm512_set1_epi8(27));
      return _mm512_mask_cmpgt_epu8_mask(mask, above, _mm512_set1_epi8(static_cast<char>(200))) != 0;
    }
    default: return true;
  }
}

// Asks for the scale at `place` of the rows behind w: callers pass a matrix strip by strip, and the scales of
// a strip are looked at before anything else is done with it.
KT_INLINE void request_next_scale(const CodedRows& w, ptrdiff_t place) {
  request((const char*)w.scales + (place + w.rows * w.scale_stride) * kScaleBytes[(int)w.scale_type]);
}

// With ordinary scales no product of a code other than zero is denormal or overflows.
inline bool scales_are_ordinary(const CodedRows& w) {
  // With e4m3's largest and smallest number this leaves the same room.
  const float global_scale = __builtin_fabsf(w.global_scale);
  bool extreme = !(global_scale >= 0x1p-90f && global_scale <= 0x1p90f);
  for_scales(w, 64 / kScaleBytes[(int)w.scale_type], [&](ptrdiff_t place, int n) KT_INLINE_LAMBDA {
    extreme |= any_extreme(w.scale_type, w.scales, place, n);
  });
  return !extreme;
}

template <ScaleType Kind>
KT_INLINE __m512 scale_of(const Coded& w, ptrdiff_t place) {
  if constexpr (Kind == ScaleType::bf16)
    return _mm512_castsi512_ps(_mm512_set1_epi32(element<uint16_t>(w.scales, place) << 16));
  return _mm512_set1_ps(element<float>(w.scales, place));
}

// Two rows, each decoded by itself.
template <class Lines>
struct LinesPair {
  Lines even, odd;

  KT_INLINE void across(const uint8_t* e, const uint8_t* o, __m512i (&b)[2]) const {
    const __m512i even_line = even.line(e), odd_line = odd.line(o);
    b[0] = _mm512_unpacklo_epi16(even_line, odd_line);
    b[1] = _mm512_unpackhi_epi16(even_line, odd_line);
  }
  static void in_order(Vec (&half)[2]) { GemvTraits::in_order(half); }
};

// A table of one row, twice.
struct NibbleLines {
  __m512i table;

  // The lower four bits of each word choose, the next one either half of the table.
  KT_INLINE __m512i line(const uint8_t* codes) const {
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(twofold(codes), _mm512_set1_epi32(4 << 16)), table);
  }
};

// The table of the even row, then that of the odd one. The first half of a line has its even columns.
struct NibblePair {
  __m512i table;

  KT_INLINE void across(const uint8_t* e, const uint8_t* o, __m512i (&b)[2]) const {
    const __m512i in_turn = _mm512_setr_epi32(  // byte i to lane i, where no mask keeps it away
        0x00008000, 0x00018001, 0x00028002, 0x00038003, 0x00048004, 0x00058005, 0x00068006, 0x00078007,
        0x00088008, 0x00098009, 0x000a800a, 0x000b800b, 0x000c800c, 0x000d800d, 0x000e800e, 0x000f800f);
    const __m512i even = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)e));
    const __m512i odd = _mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)o));
    __m512i codes = _mm512_set1_epi32(0x01000000);  // where the shift makes it the odd row's half
    codes = _mm512_mask_shuffle_epi8(codes, 0x3333333333333333, even, in_turn);
    codes = _mm512_mask_shuffle_epi8(codes, 0x4444444444444444, odd, in_turn);
    constexpr int kAndOr = 0xea;
    const __m512i lower = _mm512_ternarylogic_epi32(codes, _mm512_set1_epi32(0x000f000f),
                                                    _mm512_set1_epi32(0x00100000), kAndOr);
    b[0] = _mm512_permutexvar_epi16(lower, table);
    b[1] = _mm512_permutexvar_epi16(_mm512_srli_epi32(codes, 4), table);
  }
  static void in_order(Vec (&half)[2]) { interleave(half); }
};

template <class L, ScaleType Kind>
struct ByteCodes {
  static constexpr int kBytes = 32, kScales = 1;
  using Lines = L;
  using Pair = LinesPair<Lines>;

  KT_INLINE static Lines lines(const Coded& w, ptrdiff_t place) {
    return Lines(_mm512_cvtss_f32(scale_of<Kind>(w, place)));
  }
  KT_INLINE static Pair pair(const Coded& w, ptrdiff_t even, ptrdiff_t odd) {
    return {lines(w, even), lines(w, odd)};
  }
};

template <ScaleType Kind, bool Zeros>
struct Int4Codes {
  static constexpr int kBytes = 16, kScales = 1;
  using Lines = NibbleLines;
  using Pair = NibblePair;

  KT_INLINE static __m512 products(const Coded& w, ptrdiff_t place) {
    const float zero = Zeros ? static_cast<float>(w.zeros[place]) : 8.0f;
    return _mm512_mul_ps(_mm512_sub_ps(_mm512_load_ps(kCounts), _mm512_set1_ps(zero)),
                         scale_of<Kind>(w, place));
  }
  KT_INLINE static Lines lines(const Coded& w, ptrdiff_t place) {
    const __m512 all = products(w, place);
    return {(__m512i)_mm512_cvtne2ps_pbh(all, all)};
  }
  KT_INLINE static Pair pair(const Coded& w, ptrdiff_t even, ptrdiff_t odd) {
    return {(__m512i)_mm512_cvtne2ps_pbh(products(w, odd), products(w, even))};
  }
};

// E2M1 for a scale of 2^-127: to scale is to add to the exponent. Zeros, the first and the ninth, stay.
struct Mxfp4Codes {
  static constexpr int kBytes = 16, kScales = 1;
  using Lines = NibbleLines;
  using Pair = NibblePair;

  KT_INLINE static int exponent(const Coded& w, ptrdiff_t place) {
    return element<uint8_t>(w.scales, place) << 7;
  }
  KT_INLINE static __m512i scaled(__m512i exponents) {
    const __m512i unscaled = _mm512_broadcast_i64x4(_mm256_setr_epi16(
        0, static_cast<short>(0xff80), 0, 0x40, 0x80, 0xc0, 0x100, 0x140, static_cast<short>(0x8000), 0x7f80,
        static_cast<short>(0x8000), static_cast<short>(0x8040), static_cast<short>(0x8080),
        static_cast<short>(0x80c0), static_cast<short>(0x8100), static_cast<short>(0x8140)));
    return _mm512_mask_add_epi16(unscaled, 0xfefefefe, unscaled, exponents);
  }
  KT_INLINE static Lines lines(const Coded& w, ptrdiff_t place) {
    return {scaled(_mm512_set1_epi16(static_cast<short>(exponent(w, place))))};
  }
  KT_INLINE static Pair pair(const Coded& w, ptrdiff_t even, ptrdiff_t odd) {
    const __m512i first = _mm512_set1_epi16(static_cast<short>(exponent(w, even)));
    return {scaled(_mm512_mask_set1_epi16(first, 0xffff0000, static_cast<short>(exponent(w, odd))))};
  }
};

// E2M1 in groups of 16 with e4m3 scales.
struct Nvfp4Codes {
  static constexpr int kBytes = 16, kScales = 2;
  using Lines = HalfNibbles;
  using Pair = LinesPair<Lines>;

  KT_INLINE static __m512 products(const Coded& w, ptrdiff_t place) {
    const float scale = w.scale_values[element<uint8_t>(w.scales, place)];
    return _mm512_mul_ps(_mm512_load_ps(kE2M1), _mm512_set1_ps(scale));
  }
  KT_INLINE static Lines lines(const Coded& w, ptrdiff_t place) {
    return {(__m512i)_mm512_cvtne2ps_pbh(products(w, place + 1), products(w, place))};
  }
  KT_INLINE static Pair pair(const Coded& w, ptrdiff_t even, ptrdiff_t odd) {
    return {lines(w, even), lines(w, odd)};
  }
};

}  // namespace

}  // namespace kt::avx512_bf16
