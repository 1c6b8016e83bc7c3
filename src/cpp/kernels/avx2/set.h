// What the files of this kernel set share: its vector, and what they define of the set.
#pragma once

#include <immintrin.h>
#include <string.h>

#include "kernels/kernel_set.h"

namespace kt::avx2 {

extern const EpilogueKernels epilogue;
extern const DecodeKernels decode;

static inline __m256 widen(__m128i bits) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

// fp32 to bf16 in the upper half of each lane: nearest even, the lower half arbitrary. Of NaNs, only the two
// default ones stay NaN.
static inline __m256i nearest_bf16(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  return _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
}

// The same in the lower half, zeros above, and for every x.
static inline __m256i lower_bf16(__m256 x) {
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_srli_epi32(_mm256_or_si256(nearest_bf16(x), nan), 16);
}

static inline __m128i round_to_bf16(__m256 x) {
  const __m256i bits = lower_bf16(x);
  return _mm_packus_epi32(_mm256_castsi256_si128(bits), _mm256_extracti128_si256(bits, 1));
}

static inline __m256i round_to_bf16(__m256 low, __m256 high) {
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(lower_bf16(low), lower_bf16(high)), 0xd8);
}

namespace {

// The first n of N elements on a copy, zeros behind them: without masks nothing else may be read or written.
template <class T, int N>
struct alignas(32) Edge {
  T data[N] = {};

  Edge() = default;
  Edge(const T* src, int n) {
    if (n > 0) memcpy(data, src, n * sizeof *src);
  }
  void copy_to(T* dst, int n) const {
    if (n > 0) memcpy(dst, data, n * sizeof *dst);
  }
};

// The vector of the loops in generic/. A Part is how many of its elements there are, also more or none, and
// Pairs of the bf16 in it.
struct Vec {
  using Part = int;
  using Pairs = int;
  static constexpr int kSize = 8;
  static constexpr Part kAll = kSize;
  static constexpr bool kMasks = false;

  __m256 x;

  static Vec all(float value) { return {_mm256_set1_ps(value)}; }
  static Part first(int n) { return n; }
  static Pairs first_pairs(int n) { return n; }

  static Vec load(const float* src, Part n = kAll) {
    return {n >= kSize ? _mm256_loadu_ps(src) : _mm256_load_ps(Edge<float, kSize>(src, n).data)};
  }
  static __m128i load_halves(const uint16_t* src, Part n) {
    return n >= kSize ? _mm_loadu_si128((const __m128i*)src)
                      : _mm_load_si128((const __m128i*)Edge<uint16_t, kSize>(src, n).data);
  }
  static Vec load_bf16(const uint16_t* src, Part n = kAll) { return {widen(load_halves(src, n))}; }
  static Vec load_pairs(const uint16_t* src, Pairs n) {
    if (n >= 2 * kSize) return {_mm256_loadu_ps((const float*)src)};
    return {_mm256_load_ps((const float*)Edge<uint16_t, 2 * kSize>(src, n).data)};
  }
  static Vec load_f16(const uint16_t* src, Part n = kAll) { return {_mm256_cvtph_ps(load_halves(src, n))}; }

  void store(float* dst, Part n = kAll) const {
    if (n >= kSize) return _mm256_storeu_ps(dst, x);
    Edge<float, kSize> edge;
    _mm256_store_ps(edge.data, x);
    edge.copy_to(dst, n);
  }
  void store_bf16(uint16_t* dst, Part n = kAll) const {
    if (n >= kSize) return _mm_storeu_si128((__m128i*)dst, round_to_bf16(x));
    Edge<uint16_t, kSize> edge;
    _mm_store_si128((__m128i*)edge.data, round_to_bf16(x));
    edge.copy_to(dst, n);
  }
  // Two neighbours as one store.
  static void store_bf16(uint16_t* dst, Vec low, Vec high, Part n_low = kAll, Part n_high = kAll) {
    const __m256i rounded = round_to_bf16(low.x, high.x);
    if (n_high >= kSize) return _mm256_storeu_si256((__m256i*)dst, rounded);
    Edge<uint16_t, 2 * kSize> edge;
    _mm256_store_si256((__m256i*)edge.data, rounded);
    edge.copy_to(dst, n_high > 0 ? kSize + n_high : n_low);
  }
  static void stream_bf16(uint16_t* dst, Vec low, Vec high, Part n_low, Part n_high) {
    store_bf16(dst, low, high, n_low, n_high);
  }

  // Of pairs of bf16: the even elements, and the odd ones.
  Vec even() const { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 16))}; }
  Vec odd() const {
    return {_mm256_and_ps(x, _mm256_castsi256_ps(_mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
};

inline Vec operator+(Vec a, Vec b) { return {_mm256_add_ps(a.x, b.x)}; }
inline Vec mul_add(Vec a, Vec b, Vec c) { return {_mm256_fmadd_ps(a.x, b.x, c.x)}; }

inline float sum(Vec v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v.x), _mm256_extractf128_ps(v.x, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

// In place: lane j of row i and lane i of row j change places.
inline void transpose_block(Vec (&r)[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 a = _mm256_unpacklo_ps(r[i].x, r[i + 1].x), b = _mm256_unpackhi_ps(r[i].x, r[i + 1].x);
    const __m256 c = _mm256_unpacklo_ps(r[i + 2].x, r[i + 3].x),
                 d = _mm256_unpackhi_ps(r[i + 2].x, r[i + 3].x);
    t[i] = _mm256_shuffle_ps(a, c, 0x44);
    t[i + 1] = _mm256_shuffle_ps(a, c, 0xee);
    t[i + 2] = _mm256_shuffle_ps(b, d, 0x44);
    t[i + 3] = _mm256_shuffle_ps(b, d, 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    r[i].x = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    r[i + 4].x = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

}  // namespace

}  // namespace kt::avx2
