#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "kernels/amx/tile_unit.h"
#include "kernels/avx512/set.h"

namespace kt::layouts {

namespace {

using namespace KT_AMX;

constexpr ptrdiff_t kBLine = 128;  // bytes of a pair of k in a B panel, [k / 2][32][2]

// 8 x 8 of the 16 x 16 blocks of 2 x 2 weights change places across the diagonal, and each is transposed.
void turn_8x8(const uint16_t* from, uint16_t* to) {
  // A stage swaps halves of ever wider groups between two vectors; the first one turns the blocks as well.
  alignas(64) static const uint16_t kFirst[32] = {0,  2,  1,  3,  32, 34, 33, 35, 8,  10, 9,
                                                  11, 40, 42, 41, 43, 16, 18, 17, 19, 48, 50,
                                                  49, 51, 24, 26, 25, 27, 56, 58, 57, 59};
  const __m512i low = _mm512_load_si512(kFirst), high = _mm512_add_epi16(low, _mm512_set1_epi16(4));
  __m512i r[8], t[8];
  for (int i = 0; i < 8; ++i) r[i] = _mm512_loadu_si512(from + 64 * i);
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm512_permutex2var_epi16(r[i], low, r[i + 1]);
    t[i + 1] = _mm512_permutex2var_epi16(r[i], high, r[i + 1]);
  }
  const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13),
                odd = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; ++j) {
      r[j] = _mm512_permutex2var_epi64(t[j], even, t[j + 2]);
      r[j + 2] = _mm512_permutex2var_epi64(t[j], odd, t[j + 2]);
    }
  for (int i = 0; i < 4; ++i) {
    _mm512_storeu_si512(to + 64 * i, _mm512_shuffle_i64x2(r[i], r[i + 4], 0x44));
    _mm512_storeu_si512(to + 64 * (i + 4), _mm512_shuffle_i64x2(r[i], r[i + 4], 0xee));
  }
}

__m512bh pair(const void* at) {
  int both;
  memcpy(&both, at, sizeof both);
  return (__m512bh)_mm512_set1_epi32(both);
}
__m512bh vector(const void* at) { return (__m512bh)_mm512_loadu_si512(at); }

// R rows of w, broadcast pair by pair, times V vectors of tokens. No more rows than 6: with a row length that
// is a multiple of 4 KiB they all fall into one set of the L1 cache.
template <int R, int V>
void rows_by_vectors(int k, const uint16_t* w, ptrdiff_t w_stride, const char* b, ptrdiff_t panel_bytes,
                     float* c, ptrdiff_t ldc) {
  __m512 acc[R][V] = {};
  for (int p = 0; p < k; p += 2, b += kBLine) {
    __m512bh column[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) column[v] = vector(b + v / 2 * panel_bytes + v % 2 * 64);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512bh row = pair(w + r * w_stride + p);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], row, column[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, acc[r][v]);
}

template <int R>
void rows_forward(int cols, int k, const uint16_t* w, ptrdiff_t w_stride, const char* b,
                  ptrdiff_t panel_bytes, float* c, ptrdiff_t ldc) {
  if (cols > 32) return rows_by_vectors<R, 4>(k, w, w_stride, b, panel_bytes, c, ldc);
  if (cols > 16) return rows_by_vectors<R, 2>(k, w, w_stride, b, panel_bytes, c, ldc);
  rows_by_vectors<R, 1>(k, w, w_stride, b, panel_bytes, c, ldc);
}

void forward(int rows, int cols, int k, const uint16_t* w, ptrdiff_t w_stride, const char* b,
             ptrdiff_t panel_bytes, float* c, ptrdiff_t ldc) {
  constexpr decltype(&rows_forward<1>) kRows[] = {rows_forward<1>, rows_forward<2>, rows_forward<3>,
                                                  rows_forward<4>, rows_forward<5>, rows_forward<6>};
  kRows[rows - 1](cols, k, w, w_stride, b, panel_bytes, c, ldc);
}

void prefetch_near(const char* line, ptrdiff_t stride) {
  for (int i = 0; i < 16; ++i) _mm_prefetch(line + i * stride, _MM_HINT_T0);
}

// The set's own micro-kernel on rows of w. Tiles 0 to 3 are results, 4 and 5 hold w, 6 and 7 tokens; what
// comes two steps later is prefetched.
void tile_amx(int rows, int cols, int k, const char* w, ptrdiff_t w_bytes, const char* b, float* c,
              ptrdiff_t ldc) {
  const ptrdiff_t stride = ldc * static_cast<ptrdiff_t>(sizeof(float)), b_step = 16 * kBLine;
  const bool lower = rows > 16, right = cols > 16;
  KT_TILE_ZERO(0);
  KT_TILE_ZERO(1);
  KT_TILE_ZERO(2);
  KT_TILE_ZERO(3);
  for (int p = 0; p < k; p += 32, w += 64, b += b_step) {
    const char *next_w = w + 2 * 64, *next_b = b + 2 * b_step;
    KT_TILE_LOAD(6, b, kBLine);
    KT_TILE_LOAD(4, w, w_bytes);
    KT_TILE_MULTIPLY(0, 4, 6);
    prefetch_near(next_w, w_bytes);
    if (right) KT_TILE_LOAD(7, b + 64, kBLine);
    if (right) KT_TILE_MULTIPLY(1, 4, 7);
    if (lower) prefetch_near(next_w + 16 * w_bytes, w_bytes);
    if (lower) KT_TILE_LOAD(5, w + 16 * w_bytes, w_bytes);
    if (lower) KT_TILE_MULTIPLY(2, 5, 6);
    prefetch_near(next_b, 64);
    if (lower && right) KT_TILE_MULTIPLY(3, 5, 7);
    prefetch_near(next_b + b_step / 2, 64);
  }
  KT_TILE_STORE(0, c, stride);
  KT_TILE_STORE(1, c + 16, stride);
  if (lower) KT_TILE_STORE(2, c + 16 * ldc, stride);
  if (lower) KT_TILE_STORE(3, c + 16 * ldc + 16, stride);
}

void forward_amx(int rows, int cols, int k, const uint16_t* w, ptrdiff_t w_stride, const char* b,
                 ptrdiff_t panel_bytes, float* c, ptrdiff_t ldc) {
  for (; cols > 0; cols -= 32, b += panel_bytes, c += 32)
    tile_amx(rows, cols, k, reinterpret_cast<const char*>(w), 2 * w_stride, b, c, ldc);
}

void begin() { KT_TILES_BEGIN(); }
void end() { KT_TILES_END(); }

}  // namespace

void turn_block(const uint16_t* from, uint16_t* to) {
  for (int p = 0; p < 2; ++p)
    for (int q = 0; q < 2; ++q) turn_8x8(from + p * 512 + q * 32, to + q * 512 + p * 32);
}

extern const Direct direct_avx512_bf16, direct_amx;
const Direct direct_avx512_bf16 = {6, forward, nullptr, nullptr};
const Direct direct_amx = {32, forward_amx, begin, end};

}  // namespace kt::layouts
