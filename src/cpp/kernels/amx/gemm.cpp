// Four result tiles from two tiles of A (32 rows) and two of B (32 columns): each load feeds two products.
// Panels are those of avx512_bf16, A with 32 rows: 64-byte lines of A and pairs of B are what tiles hold.
#include <string.h>

#ifdef KT_TILE_UNIT
#include KT_TILE_UNIT
#else
#include "kernels/amx/tile_unit.h"
#endif
#include "kernels/avx512_bf16/set.h"

namespace kt::KT_AMX {

namespace {

constexpr int MR = 32;
constexpr int NR = avx512_bf16::NR;
constexpr int KB = avx512_bf16::KB;
constexpr ptrdiff_t kABytes = MR * KB * sizeof(uint16_t),
                    kBBytes = NR * KB * sizeof(uint16_t);  // of KB in a panel: two tiles each
constexpr ptrdiff_t kAStride = KB * sizeof(uint16_t), kBStride = NR * 2 * sizeof(uint16_t);

void pack_a(RowSource src, int rows, int k, void* panel) { avx512_bf16::copy_rows<MR>(src, rows, k, panel); }

// Tile loads wait for the L2 cache, and no hardware prefetcher follows them: what is needed kAhead steps
// later is asked for between the products, which gives half as much speed again.
constexpr int kAhead = 2;

KT_INLINE void prefetch_tile(const char* bytes) {
  for (int line = 0; line < 16; ++line) _mm_prefetch(bytes + 64 * line, _MM_HINT_T0);
}

// Where the product is, from element to element; behind the last one it goes on, to the next panels.
struct Position {
  const BatchElement *element, *end;
  int p = 0;
  const char *a = static_cast<const char*>(element->a), *b = static_cast<const char*>(element->b);

  KT_INLINE void advance() {
    p += KB, a += kABytes, b += kBBytes;
    if (p >= element->k && element + 1 != end) *this = {element + 1, end};
  }
};

// Tiles: 0 1 are the upper row of results, 2 3 the lower, 4 5 hold A, 6 7 hold B.
template <bool Lower, bool Right>
void tile(const BatchElement* batch, int count, float* c, ptrdiff_t ldc, bool add) {
  const ptrdiff_t stride = ldc * static_cast<ptrdiff_t>(sizeof(float));
  float* lower = c + 16 * ldc;
  if (add) {
    KT_TILE_LOAD(0, c, stride);
    if constexpr (Right) KT_TILE_LOAD(1, c + 16, stride);
    if constexpr (Lower) KT_TILE_LOAD(2, lower, stride);
    if constexpr (Lower && Right) KT_TILE_LOAD(3, lower + 16, stride);
  } else {
    KT_TILE_ZERO(0);
    KT_TILE_ZERO(1);
    KT_TILE_ZERO(2);
    KT_TILE_ZERO(3);
  }
  Position next{batch, batch + count};
  for (int i = 0; i < kAhead; ++i) next.advance();
  for (const BatchElement* element = batch; element != batch + count; ++element) {
    const char* a = static_cast<const char*>(element->a);
    const char* b = static_cast<const char*>(element->b);
    for (int p = 0; p < element->k; p += KB, a += kABytes, b += kBBytes, next.advance()) {
      KT_TILE_LOAD(6, b, kBStride);
      KT_TILE_LOAD(4, a, kAStride);
      if constexpr (Right) KT_TILE_LOAD(7, b + 64, kBStride);
      if constexpr (Lower) KT_TILE_LOAD(5, a + kABytes / 2, kAStride);
      KT_TILE_MULTIPLY(0, 4, 6);
      prefetch_tile(next.a);
      if constexpr (Right) KT_TILE_MULTIPLY(1, 4, 7);
      if constexpr (Lower) prefetch_tile(next.a + kABytes / 2);
      if constexpr (Lower) KT_TILE_MULTIPLY(2, 5, 6);
      prefetch_tile(next.b);
      if constexpr (Lower && Right) KT_TILE_MULTIPLY(3, 5, 7);
      prefetch_tile(next.b + kBBytes / 2);
    }
  }
  KT_TILE_STORE(0, c, stride);
  if constexpr (Right) KT_TILE_STORE(1, c + 16, stride);
  if constexpr (Lower) KT_TILE_STORE(2, lower, stride);
  if constexpr (Lower && Right) KT_TILE_STORE(3, lower + 16, stride);
}

using Tile = void (*)(const BatchElement*, int, float*, ptrdiff_t, bool);
constexpr Tile kTiles[2][2] = {{tile<false, false>, tile<false, true>},
                               {tile<true, false>, tile<true, true>}};

void copy_rows_of_c(const float* from, ptrdiff_t from_stride, float* to, ptrdiff_t to_stride, int rows) {
  for (int i = 0; i < rows; ++i) memcpy(to + i * to_stride, from + i * from_stride, NR * sizeof(float));
}

// A tile is stored whole: a result whose rows do not fill its tiles is computed aside.
void micro_kernel(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  const Tile whole_tiles = kTiles[rows > 16][cols > 16];
  if (rows % 16 == 0) return whole_tiles(batch, count, c, ldc, accumulate);
  alignas(64) float aside[MR * NR];
  if (accumulate) copy_rows_of_c(c, ldc, aside, NR, rows);
  whole_tiles(batch, count, aside, NR, accumulate);
  copy_rows_of_c(aside, NR, c, ldc, rows);
}

double peak(int rounds, void* registers) {
  constexpr int kTileBytes = 16 * kAStride;
  char* words = static_cast<char*>(registers);
  KT_TILE_LOAD(0, words, kAStride);
  KT_TILE_LOAD(1, words + kTileBytes, kAStride);
  KT_TILE_LOAD(2, words + 2 * kTileBytes, kAStride);
  KT_TILE_LOAD(3, words + 3 * kTileBytes, kAStride);
  KT_TILE_LOAD(4, words + 4 * kTileBytes, kAStride);
  KT_TILE_LOAD(5, words + 5 * kTileBytes, kAStride);
  KT_TILE_LOAD(6, words + 6 * kTileBytes, kAStride);
  KT_TILE_LOAD(7, words + 7 * kTileBytes, kAStride);
  for (int round = 0; round < rounds; ++round) {
    KT_TILE_MULTIPLY(0, 6, 7);
    KT_TILE_MULTIPLY(1, 6, 7);
    KT_TILE_MULTIPLY(2, 6, 7);
    KT_TILE_MULTIPLY(3, 6, 7);
    KT_TILE_MULTIPLY(4, 6, 7);
    KT_TILE_MULTIPLY(5, 6, 7);
  }
  KT_TILE_STORE(0, words, kAStride);
  KT_TILE_STORE(1, words + kTileBytes, kAStride);
  KT_TILE_STORE(2, words + 2 * kTileBytes, kAStride);
  KT_TILE_STORE(3, words + 3 * kTileBytes, kAStride);
  KT_TILE_STORE(4, words + 4 * kTileBytes, kAStride);
  KT_TILE_STORE(5, words + 5 * kTileBytes, kAStride);
  return 2.0 * 16 * 16 * KB * 6 * rounds;
}

void begin() { KT_TILES_BEGIN(); }
void end() { KT_TILES_END(); }

constexpr GemmKernels gemm = {.mr = MR,
                              .nr = NR,
                              .k_align = KB,
                              .element_bytes = sizeof(uint16_t),
                              .pack_a = pack_a,
                              .pack_b_cols = avx512_bf16::pack_b_cols,
                              .pack_b_rows = avx512_bf16::pack_b_rows,
                              .micro_kernel = micro_kernel,
                              .peak = peak,
                              .begin = begin,
                              .end = end};

}  // namespace

extern const OwnKernels kernels;
const OwnKernels kernels = {.gemm = &gemm};

}  // namespace kt::KT_AMX
