// Products, on fp32.
#include "kernels/avx2/set.h"
#include "kernels/generic/gemv.h"
#include "kernels/generic/tile.h"

namespace kt::avx2 {

namespace {

struct TileTraits : F32Tile<Vec> {
  // 12 accumulators, 2 vectors of B and 1 broadcast of A in 16 registers.
  static constexpr int kTileRows = 6, kMaxEdge = kGemvRows / 2;
  static constexpr int kChains = 12;  // two units, each with a latency of at most 6 multiply-adds
  static constexpr bool kFromC = true, kPrefetches = false;
};

struct GemvTraits : F32Gemv<Vec> {
  static constexpr int kStackBytes = 32768;
  static constexpr int kUnaided = 0;
  static constexpr bool kInOrder = false;
  static constexpr int kNearLines[] = {4};
  static constexpr int dot_rows(int m) { return m <= 5 ? 2 : 1; }
  static constexpr int tile_rows(int m) { return m <= 6 ? m : (m + 1) / 2; }  // what the registers hold
  // A line has two runs, and has to stay in L1 for the second even where rows are 4 KiB apart: not more rows
  // than a cache set has ways.
  static constexpr int block_rows(int m) { return m <= 6 ? 6 : 8; }
};

// Unpacking interleaves within 128 bits: the lower ones of both have the first eight columns.
void interleave(Vec (&half)[2]) {
  const __m256 a = _mm256_unpacklo_ps(half[0].x, half[1].x), b = _mm256_unpackhi_ps(half[0].x, half[1].x);
  half[0].x = _mm256_permute2f128_ps(a, b, 0x20);
  half[1].x = _mm256_permute2f128_ps(a, b, 0x31);
}

template <int N>
void sum_each(const Vec (&x)[N], float* sums) {
#pragma GCC unroll 16
  for (int i = 0; i < N; ++i) sums[i] = sum(x[i]);
}

constexpr GemvKernels gemv = {gemv_nt<GemvTraits>, gemv_nn<GemvTraits>};

}  // namespace

extern const OwnKernels kernels;
const OwnKernels kernels = {
    .gemm = &kF32Gemm<TileTraits>, .gemv = &gemv, .epilogue = &epilogue, .decode = &decode};

}  // namespace kt::avx2
