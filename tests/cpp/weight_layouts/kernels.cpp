#include <immintrin.h>
#include <string.h>

#include "kernels.h"
#include "kernels/amx/tile_unit.h"
#include "kernels/avx512/registers.h"

namespace kt::layouts {

namespace {

using namespace KT_AMX;

constexpr int kARows = 12;         // of avx512_bf16's A panel, [k / 32][12][32]
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

void prefetch(const Ahead& ahead, int p) {
  const char* line = ahead.first + p / 32 * ahead.run;
  for (int i = 0; i < ahead.lines; ++i, line += ahead.line) _mm_prefetch(line, _MM_HINT_T1);
}

template <int R, int V>
void panels(int k, const char* a, const char* b, float* c, ptrdiff_t ldc, const Ahead& ahead) {
  __m512 acc[R][V] = {};
  for (int p = 0; p < k; p += 32, a += kARows * 64) {
    prefetch(ahead, p);
#pragma GCC unroll 4
    for (int q = 0; q < 16; ++q, b += kBLine) {
      __m512bh column[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) column[v] = vector(b + 64 * v);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512bh row = pair(a + 64 * r + 4 * q);
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v) acc[r][v] = _mm512_dpbf16_ps(acc[r][v], row, column[v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, acc[r][v]);
}

void multiply_vectors(int rows, int cols, int k, const char* a, const char* b, float* c, ptrdiff_t ldc,
                      const Ahead& ahead) {
  const auto kernel =
      rows <= 8 ? (cols > 16 ? panels<8, 2> : panels<8, 1>) : (cols > 16 ? panels<12, 2> : panels<12, 1>);
  kernel(k, a, b, c, ldc, ahead);
}

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

// Dot products along k, 3 rows of w by 8 tokens.
template <int R>
void dots(int k, const uint16_t* w, ptrdiff_t w_stride, const char* a, float* c, ptrdiff_t ldc, bool add) {
  __m512 acc[R][8] = {};
  for (int p = 0; p < k; p += 32, a += kARows * 64) {
    __m512bh row[R];
#pragma GCC unroll 3
    for (int r = 0; r < R; ++r) {
      row[r] = vector(w + r * w_stride + p);
      _mm_prefetch(w + (r + R) * w_stride + p, _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t) {
      const __m512bh token = vector(a + 64 * t);
#pragma GCC unroll 3
      for (int r = 0; r < R; ++r) acc[r][t] = _mm512_dpbf16_ps(acc[r][t], row[r], token);
    }
  }
#pragma GCC unroll 3
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < 8; ++t)
      c[r * ldc + t] = _mm512_reduce_add_ps(acc[r][t]) + (add ? c[r * ldc + t] : 0.0f);
}

void forward_few(int rows, int k, const uint16_t* w, ptrdiff_t w_stride, const char* a, float* c,
                 ptrdiff_t ldc) {
  constexpr int kBlock = 512;  // the tokens' part stays in the L1 cache while rows of w pass by
  for (int p = 0; p < k; p += kBlock) {
    const int block = k - p < kBlock ? k - p : kBlock;
    const char* tokens = a + p / 32 * kARows * 64;
    int r = 0;
    for (; r + 3 <= rows; r += 3)
      dots<3>(block, w + r * w_stride + p, w_stride, tokens, c + r * ldc, ldc, p > 0);
    for (; r < rows; ++r) dots<1>(block, w + r * w_stride + p, w_stride, tokens, c + r * ldc, ldc, p > 0);
  }
}

// Two rows of 32 weights as pairs: columns 0 to 15 and 16 to 31.
struct Pairs {
  __m512i left, right;
};

Pairs interleave(const uint16_t* w, ptrdiff_t w_stride) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  const __m512i even = _mm512_loadu_si512(w), odd = _mm512_loadu_si512(w + w_stride);
  return {_mm512_permutex2var_epi16(even, low, odd), _mm512_permutex2var_epi16(even, high, odd)};
}

template <int R>
void across(int k, const char* a, const uint16_t* w, ptrdiff_t w_stride, float* c, ptrdiff_t ldc) {
  __m512 acc[R][2];
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) acc[r][v] = _mm512_loadu_ps(c + r * ldc + 16 * v);
  for (; k > 0; k -= 32, a += kARows * 64)
    for (int p = 0; p < 32; p += 2, w += 2 * w_stride) {
      const Pairs pairs = interleave(w, w_stride);
      _mm_prefetch(w + 32 * w_stride, _MM_HINT_T1);
      _mm_prefetch(w + 33 * w_stride, _MM_HINT_T1);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const __m512bh token = pair(a + 64 * r + 2 * p);
        acc[r][0] = _mm512_dpbf16_ps(acc[r][0], token, (__m512bh)pairs.left);
        acc[r][1] = _mm512_dpbf16_ps(acc[r][1], token, (__m512bh)pairs.right);
      }
    }
#pragma GCC unroll 12
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) _mm512_storeu_ps(c + r * ldc + 16 * v, acc[r][v]);
}

void backward_few(int rows, int k, const char* a, const uint16_t* w, ptrdiff_t w_stride, float* c,
                  ptrdiff_t ldc) {
  rows <= 8 ? across<8>(k, a, w, w_stride, c, ldc) : across<kARows>(k, a, w, w_stride, c, ldc);
}

void prefetch_near(const char* line, ptrdiff_t stride) {
  for (int i = 0; i < 16; ++i) _mm_prefetch(line + i * stride, _MM_HINT_T0);
}

// The set's own micro-kernel, with rows of A `a_stride` bytes apart and 32 of k `a_step` bytes after the
// last. Tiles 0 to 3 are results, 4 and 5 hold A, 6 and 7 B; what comes two steps later is prefetched.
void multiply_tiles(int rows, int cols, int k, const char* a, ptrdiff_t a_stride, ptrdiff_t a_step,
                    const char* b, float* c, ptrdiff_t ldc, const Ahead& ahead) {
  const ptrdiff_t stride = ldc * static_cast<ptrdiff_t>(sizeof(float)), b_step = 16 * kBLine;
  const bool lower = rows > 16, right = cols > 16;
  KT_TILE_ZERO(0);
  KT_TILE_ZERO(1);
  KT_TILE_ZERO(2);
  KT_TILE_ZERO(3);
  for (int p = 0; p < k; p += 32, a += a_step, b += b_step) {
    const char *next_a = a + 2 * a_step, *next_b = b + 2 * b_step;
    prefetch(ahead, p);
    KT_TILE_LOAD(6, b, kBLine);
    KT_TILE_LOAD(4, a, a_stride);
    KT_TILE_MULTIPLY(0, 4, 6);
    prefetch_near(next_a, a_stride);
    if (right) KT_TILE_LOAD(7, b + 64, kBLine);
    if (right) KT_TILE_MULTIPLY(1, 4, 7);
    if (lower) prefetch_near(next_a + 16 * a_stride, a_stride);
    if (lower) KT_TILE_LOAD(5, a + 16 * a_stride, a_stride);
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

void multiply_amx(int rows, int cols, int k, const char* a, const char* b, float* c, ptrdiff_t ldc,
                  const Ahead& ahead) {
  multiply_tiles(rows, cols, k, a, 64, 32 * 64, b, c, ldc, ahead);
}

void forward_amx(int rows, int cols, int k, const uint16_t* w, ptrdiff_t w_stride, const char* b,
                 ptrdiff_t panel_bytes, float* c, ptrdiff_t ldc) {
  for (; cols > 0; cols -= 32, b += panel_bytes, c += 32)
    multiply_tiles(rows, cols, k, reinterpret_cast<const char*>(w), 2 * w_stride, 64, b, c, ldc, {});
}

void begin() { KT_TILES_BEGIN(); }
void end() { KT_TILES_END(); }

}  // namespace

void turn_block(const uint16_t* from, uint16_t* to) {
  for (int p = 0; p < 2; ++p)
    for (int q = 0; q < 2; ++q) turn_8x8(from + p * 512 + q * 32, to + q * 512 + p * 32);
}

// Few rows at a time over the whole width: a run of some lines in each row lets the hardware prefetch, where
// one panel after the other would touch a line a row, often in one and the same set of the cache.
void pack_strip(const uint16_t* w, ptrdiff_t w_stride, int k, int cols, char* panels, ptrdiff_t panel_bytes) {
  for (int p = 0; p < k; p += 8)
    for (int j = 0; j < cols; j += 32)
      for (int q = p; q < p + 8; q += 2) {
        const Pairs pairs = interleave(w + q * w_stride + j, w_stride);
        char* line = panels + j / 32 * panel_bytes + q / 2 * kBLine;
        _mm512_store_si512(line, pairs.left);
        _mm512_store_si512(line + 64, pairs.right);
      }
}

extern const Direct direct_avx512_bf16, direct_amx;
const Direct direct_avx512_bf16 = {multiply_vectors, 6, forward, forward_few, backward_few, nullptr, nullptr};
const Direct direct_amx = {multiply_amx, 32, forward_amx, nullptr, nullptr, begin, end};

}  // namespace kt::layouts
