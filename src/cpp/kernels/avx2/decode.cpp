#include "kernels/avx2/set.h"
#include "kernels/generic/groups.h"

namespace kt::avx2 {

namespace {

// The decoders of decode_rows.

struct Int8 {
  __m256 scale;

  KT_INLINE explicit Int8(float all) : scale(_mm256_set1_ps(all)) {}

  KT_INLINE __m256i product(const uint8_t* codes) const {
    const __m256i values = _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)codes));
    return _mm256_srli_epi32(nearest_bf16(_mm256_mul_ps(_mm256_cvtepi32_ps(values), scale)), 16);
  }
  KT_INLINE void operator()(const uint8_t* codes, uint16_t* dst) const {
    for (int i = 0; i < kDecoderCols; i += 16) {
      const __m256i words = _mm256_packus_epi32(product(codes + i), product(codes + i + 8));
      _mm256_storeu_si256((__m256i*)(dst + i), _mm256_permute4x64_epi64(words, 0xd8));
    }
  }
};

// Sixteen bf16, their lower and upper bytes apart, each in both halves: what VPSHUFB looks up.
struct Table {
  __m256i lower, upper;

  KT_INLINE explicit Table(const float* values, float offset, float scale) {
    // In order after the unpacking: 0-3 and 8-11, 4-7 and 12-15.
    const __m256i even = product(values, values + 8, offset, scale);
    const __m256i odd = product(values + 4, values + 12, offset, scale);
    const __m256i halves = _mm256_unpacklo_epi32(even, odd);
    lower = _mm256_permute4x64_epi64(halves, 0x88);
    upper = _mm256_permute4x64_epi64(halves, 0xdd);
  }

  // Of each half's four products: the third bytes, then the fourth.
  KT_INLINE static __m256i product(const float* low, const float* high, float offset, float scale) {
    const __m256 values = _mm256_sub_ps(_mm256_loadu2_m128(high, low), _mm256_set1_ps(offset));
    const __m256i by_byte = _mm256_set1_epi64x(0x0f0b07030e0a0602);
    return _mm256_shuffle_epi8(nearest_bf16(_mm256_mul_ps(values, _mm256_set1_ps(scale))), by_byte);
  }
};

struct Nibbles {
  Table table;

  KT_INLINE Nibbles(const float* values, float zero, float scale) : table(values, zero, scale) {}

  KT_INLINE void operator()(const uint8_t* codes, uint16_t* dst) const {
    // Bytes 0-3 and 8-11, 4-7 and 12-15 as words: so unpacked words are in order.
    const __m256i spread = _mm256_setr_epi8(0, -1, 1, -1, 2, -1, 3, -1, 8, -1, 9, -1, 10, -1, 11, -1,  //
                                            4, -1, 5, -1, 6, -1, 7, -1, 12, -1, 13, -1, 14, -1, 15, -1);
    const __m256i bytes = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)codes));
    const __m256i words = _mm256_shuffle_epi8(bytes, spread);
    const __m256i places =
        _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
    const __m256i lower = _mm256_shuffle_epi8(table.lower, places);
    const __m256i upper = _mm256_shuffle_epi8(table.upper, places);
    _mm256_storeu_si256((__m256i*)dst, _mm256_unpacklo_epi8(lower, upper));
    _mm256_storeu_si256((__m256i*)(dst + 16), _mm256_unpackhi_epi8(lower, upper));
  }
};

// Groups of 16 columns: a table for each, in the half that decodes them.
struct HalfNibbles {
  __m256i lower, upper;

  KT_INLINE HalfNibbles(const float* values, float first_scale, float second_scale)
      : HalfNibbles(Table(values, 0.0f, first_scale), Table(values, 0.0f, second_scale)) {}
  KT_INLINE HalfNibbles(const Table& first, const Table& second)
      : lower(_mm256_blend_epi32(first.lower, second.lower, 0xf0)),
        upper(_mm256_blend_epi32(first.upper, second.upper, 0xf0)) {}
  KT_INLINE void operator()(const uint8_t* codes, uint16_t* dst) const {
    const __m256i words = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)codes));
    const __m256i places =
        _mm256_and_si256(_mm256_or_si256(words, _mm256_slli_epi16(words, 4)), _mm256_set1_epi8(15));
    const __m256i low = _mm256_shuffle_epi8(lower, places), high = _mm256_shuffle_epi8(upper, places);
    // Columns 0-7 and 16-23, 8-15 and 24-31.
    const __m256i even = _mm256_unpacklo_epi8(low, high), odd = _mm256_unpackhi_epi8(low, high);
    _mm256_storeu_si256((__m256i*)dst, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256((__m256i*)(dst + 16), _mm256_permute2x128_si256(even, odd, 0x31));
  }
};

// A code is sign, exponent (4 bits), mantissa (3). To double a normal product adds 1 to its exponent, so
// sixteen products are enough: those of the codes below 8, which have no leading one, and of exponent 1.
struct Fp8 {
  Table table;

  KT_INLINE explicit Fp8(float scale) : table(kCounts, 0.0f, scale * 0x1p-9f) {}

  KT_INLINE void operator()(const uint8_t* codes, uint16_t* dst) const {
    const __m256i zero = _mm256_setzero_si256(), largest = _mm256_set1_epi8(0x7f);
    // Bytes in the order 0-7, 16-23, 8-15, 24-31: so unpacked words are in order.
    const __m256i code = _mm256_permute4x64_epi64(_mm256_loadu_si256((const __m256i*)codes), 0xd8);
    const __m256i magnitude = _mm256_and_si256(code, largest), nan = _mm256_cmpeq_epi8(magnitude, largest);
    const __m256i mantissa = _mm256_and_si256(code, _mm256_set1_epi8(7));
    const __m256i place = _mm256_min_epu8(magnitude, _mm256_or_si256(mantissa, _mm256_set1_epi8(8)));
    const __m256i doublings = _mm256_andnot_si256(nan, _mm256_sub_epi8(magnitude, place));
    const __m256i lower = _mm256_or_si256(_mm256_shuffle_epi8(table.lower, place), nan);
    const __m256i sign = _mm256_andnot_si256(largest, code);
    const __m256i upper =
        _mm256_or_si256(_mm256_xor_si256(_mm256_shuffle_epi8(table.upper, place), sign), nan);
    _mm256_storeu_si256((__m256i*)dst,
                        _mm256_add_epi16(_mm256_unpacklo_epi8(lower, upper),
                                         _mm256_slli_epi16(_mm256_unpacklo_epi8(doublings, zero), 4)));
    _mm256_storeu_si256((__m256i*)(dst + 16),
                        _mm256_add_epi16(_mm256_unpackhi_epi8(lower, upper),
                                         _mm256_slli_epi16(_mm256_unpackhi_epi8(doublings, zero), 4)));
  }
};

}  // namespace

const DecodeKernels decode = Decodes<Vec, Int8, Nibbles, HalfNibbles, Fp8>::kKernels;

}  // namespace kt::avx2
