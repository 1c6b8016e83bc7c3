// Lines of 32 codes decoded in registers, shared with the sets that extend AVX-512. Internal linkage, as all
// that headers of kernel folders hold.
#pragma once

#include "kernels/avx512/registers.h"
#include "kernels/scalar/groups.h"

namespace kt {

namespace {

// What columns with one scale share; line(codes) decodes 32 of them, to the bits of DecodeCodes.

struct Int8 {
  __m512 scale;

  __attribute__((always_inline)) __m512i product(const uint8_t* codes) const {
    const __m512i values = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)codes));
    return nearest_bf16(_mm512_mul_ps(_mm512_cvtepi32_ps(values), scale));
  }
  __attribute__((always_inline)) __m512i line(const uint8_t* codes) const {
    return upper_halves(product(codes), product(codes + 16));
  }
};

// Both bytes of a word are the byte that holds its column's code, in the lower bits for even columns.
__attribute__((always_inline)) static inline __m512i twofold(const uint8_t* codes) {
  const __m512i four_times = _mm512_setr_epi32(
      0x00000000, 0x01010101, 0x02020202, 0x03030303, 0x04040404, 0x05050505, 0x06060606, 0x07070707,
      0x08080808, 0x09090909, 0x0a0a0a0a, 0x0b0b0b0b, 0x0c0c0c0c, 0x0d0d0d0d, 0x0e0e0e0e, 0x0f0f0f0f);
  return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)codes)), four_times);
}

// What each of the sixteen codes stands for is rounded once, then looked up. Each byte becomes a pair of
// words, of which bits 1 to 4 choose one of the pairs of equal words in the table.
struct Nibbles {
  __m512i table;

  __attribute__((always_inline)) Nibbles(__m512 values, float scale) {
    const __m512i upper_twice = _mm512_set4_epi32(0x0f0e0f0e, 0x0b0a0b0a, 0x07060706, 0x03020302);
    table = _mm512_shuffle_epi8(nearest_bf16(_mm512_mul_ps(values, _mm512_set1_ps(scale))), upper_twice);
  }
  __attribute__((always_inline)) __m512i line(const uint8_t* codes) const {
    const __m512i places = _mm512_srlv_epi16(twofold(codes), _mm512_set1_epi32(3 << 16 | 7));
    return _mm512_permutexvar_epi16(places, table);
  }
};

// Groups of 16 columns: sixteen words for the first, then for the second.
struct HalfNibbles {
  __m512i table;

  __attribute__((always_inline)) __m512i line(const uint8_t* codes) const {
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
  __attribute__((always_inline)) explicit Fp8(float scale) {
    const __m512 products = _mm512_mul_ps(_mm512_load_ps(kCounts), _mm512_set1_ps(scale * 0x1p-9f));
    table = _mm512_castsi256_si512(round_to_bf16(products));
  }
  __attribute__((always_inline)) __m512i line(const uint8_t* codes) const {
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

// A step of decode_rows.
template <class Lines>
struct Stored {
  Lines lines;

  __attribute__((always_inline)) void operator()(const uint8_t* codes, uint16_t* dst) const {
    _mm512_storeu_si512(dst, lines.line(codes));
  }
};

}  // namespace

}  // namespace kt
