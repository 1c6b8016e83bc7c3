// What the products of the AVX-512 sets have in common. Internal linkage.
#pragma once

#include "kernels/avx512/set.h"
#include "kernels/generic/gemv.h"
#include "kernels/generic/tile.h"

namespace kt::avx512 {

namespace {

struct TileTuning {
  // 24 accumulators, 2 vectors of B and 1 broadcast of A in 32 registers.
  static constexpr int kTileRows = 12, kMaxEdge = kGemvRows;
  static constexpr int kChains = 16;  // two units, each with a latency of at most 8 multiply-adds
  static constexpr bool kFromC = false, kPrefetches = true;
};

struct GemvTuning {
  static constexpr int kStackBytes = 65536;  // L2 holds them
  static constexpr bool kInOrder = true;
  static constexpr int kNearLines[] = {6, 2};
  static constexpr int dot_rows(int m) { return m <= 4 ? 1 : 2; }
  static constexpr int tile_rows(int m) { return m; }
  static constexpr int block_rows(int) { return 32; }
};

// `low` picks the first half of the columns out of both; the second half lies 8 lanes on.
inline void interleave(Vec (&half)[2], __m512i low) {
  const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
  const __m512 first = _mm512_permutex2var_ps(half[0].x, low, half[1].x);
  half[1].x = _mm512_permutex2var_ps(half[0].x, high, half[1].x);
  half[0].x = first;
}

inline void interleave(Vec (&half)[2]) {
  interleave(half, _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23));
}

// {a, b, c, d}, each summed over its lanes.
inline __m128 sum_lanes(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

// Four at a time: `sums` has room for as many.
template <int N>
KT_INLINE void sum_each(const Vec (&x)[N], float* sums) {
#pragma GCC unroll 4
  for (int q = 0; q < N; q += 4) {
    const auto part = [&](int i) { return q + i < N ? x[q + i].x : _mm512_setzero_ps(); };
    _mm_storeu_ps(sums + q, sum_lanes(part(0), part(1), part(2), part(3)));
  }
}

}  // namespace

}  // namespace kt::avx512
