// GEMVs with codes. To decode what memory gives takes as long as to load it, so there is no time for a detour
// through the cache: lines are decoded in registers and multiplied at once. Columns come in whole lines, in
// `nn` rows in pairs, and scales are ordinary; everything else is refused.
#include "kernels/avx512_bf16/coded.h"
#include "kernels/avx512_bf16/set.h"

namespace kt::avx512_bf16 {

namespace {

constexpr int kCacheLine = 64;
// Bytes of W from where it is read to where it is asked for: along k, and across for the second time, when
// the first was a block before.
constexpr int kAhead = 4096, kNear = 2 * kCacheLine;
constexpr int kBlock = GemvTraits::block_rows(1);  // rows of W between two visits to C

// The next Count lines of R rows, times the same lines of M rows of X. `lines` are made anew for every line
// where Each, whose groups are of one line or less.
template <class Codes, int M, int R, int Count, bool Each>
KT_INLINE void dot_lines(Vec (&acc)[R * M], const Coded& w, const char*& x, const uint8_t* (&codes)[R],
                         ptrdiff_t (&place)[R], typename Codes::Lines (&lines)[R], ptrdiff_t ahead) {
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    request(codes[r] + ahead);
    if constexpr (Each) request_next_scale(w, place[r]);
  }
#pragma GCC unroll 4
  for (int q = 0; q < Count; ++q) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      if constexpr (Each) lines[r] = Codes::lines(w, place[r] + q * Codes::kScales);
      const auto line = (GemvTraits::Run)lines[r].line(codes[r] + q * Codes::kBytes);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i)
        acc[i * R + r] = GemvTraits::dot(line, x + (q * M + i) * GemvTraits::kRunBytes, acc[i * R + r]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    codes[r] += Count * Codes::kBytes;
    if (Each) place[r] += Count * Codes::kScales;
  }
  x += Count * M * GemvTraits::kRunBytes;
}

// C[M x rows], rows <= R, from columns p to p + count of W's rows j to j + R; groups may begin before p.
template <class Codes, int M, int R>
void coded_dot_tile(const char* x, const Coded& w, int p, int count, int j, ptrdiff_t ahead, float* c,
                    ptrdiff_t ldc, int accumulate) {
  constexpr int kTogether = kCacheLine / Codes::kBytes;
  const uint8_t* codes[R];
  ptrdiff_t place[R];
  typename Codes::Lines lines[R];
  const int rows = smaller(R, w.rows - j);
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
    const ptrdiff_t row = j + smaller(r, rows - 1);
    codes[r] = w.codes + row * w.stride + p / kLine * Codes::kBytes;
    place[r] = row * w.scale_stride + p / w.group;
  }
  Vec acc[R * M];
#pragma GCC unroll 16
  for (int q = 0; q < R * M; ++q) acc[q] = Vec::all(0.0f);
  if (Codes::kScales > 1 || w.group == kLine) {
    for (; count >= kTogether * kLine; count -= kTogether * kLine)
      dot_lines<Codes, M, R, kTogether, true>(acc, w, x, codes, place, lines, ahead);
    for (; count > 0; count -= kLine) dot_lines<Codes, M, R, 1, true>(acc, w, x, codes, place, lines, ahead);
  }
  if constexpr (Codes::kScales == 1) {
    for (int left = w.group - p % w.group; count > 0; left = w.group) {
      int n = smaller(left, count);
      count -= n;
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) lines[r] = Codes::lines(w, place[r]++);
      for (; n >= kTogether * kLine; n -= kTogether * kLine)
        dot_lines<Codes, M, R, kTogether, false>(acc, w, x, codes, place, lines, ahead);
      for (; n > 0; n -= kLine) dot_lines<Codes, M, R, 1, false>(acc, w, x, codes, place, lines, ahead);
    }
  }
  add_dots<M, R>(acc, rows, c, ldc, accumulate);
}

template <class Codes, int M>
void coded_nt(RowSource x, const Coded& w, float* c, ptrdiff_t ldc, int accumulate) {
  constexpr int R = M <= 2 ? 4 : 2;  // as many sums at once as hide the latency of an addition
  const int row_bytes = w.cols / kLine * Codes::kBytes, together = R * row_bytes;
  const ptrdiff_t ahead = row_bytes >= kAhead ? kAhead : (kAhead + together - 1) / together * R * w.stride;
  for_dot_tiles<GemvTraits, M, R>(w.rows, w.cols, x, [&](const char* lines, int p, int count, int j, int) {
    coded_dot_tile<Codes, M, R>(lines, w, p, count, j, ahead, c + j, ldc, accumulate || p > 0);
  });
}

// C[M x 32 V] (+)= X * W for `rows` rows of W and its columns from `col` on; x holds its terms as
// [rows / 2][M]. `far` and `near` bytes on lie the codes to ask for. Shared: all rows have the same scales.
template <class Codes, int M, int V, bool Shared>
void coded_cross_tile(const uint32_t* x, int rows, const Coded& w, int first, int col, ptrdiff_t far,
                      ptrdiff_t near, float* c, ptrdiff_t ldc, int accumulate) {
  using Pair = typename Codes::Pair;
  const uint8_t* codes = w.codes + first * w.stride + col / kLine * Codes::kBytes;
  ptrdiff_t place[V];
  Pair pair[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    place[v] = first * w.scale_stride + (col + v * kLine) / w.group;
    if constexpr (Shared) pair[v] = Codes::pair(w, place[v], place[v]);
  }
  Vec acc[M][V][2];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) acc[i][v][0] = acc[i][v][1] = Vec::all(0.0f);
  for (int p = 0; p < rows; p += 2, codes += 2 * w.stride, x += M) {
    request(codes + far);
    request(codes + w.stride + far);
    request(codes + near);
    request(codes + w.stride + near);
    if constexpr (!Shared) {
      request_next_scale(w, place[0]);
      request_next_scale(w, place[0] + w.scale_stride);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      if constexpr (!Shared) {
        pair[v] = Codes::pair(w, place[v], place[v] + w.scale_stride);
        place[v] += 2 * w.scale_stride;
      }
      __m512i b[2];
      pair[v].across(codes + v * Codes::kBytes, codes + w.stride + v * Codes::kBytes, b);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) {
        const __m512i term = GemvTraits::broadcast(x[i]);
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) acc[i][v][h] = GemvTraits::multiply_add(term, b[h], acc[i][v][h]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      Pair::in_order(acc[i][v]);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        float* to = c + i * ldc + v * kLine + h * Vec::kSize;
        (accumulate ? acc[i][v][h] + Vec::load(to) : acc[i][v][h]).store(to);
      }
    }
}

// A block of rows of W after the other, each from left to right: its sum is added to C.
template <class Codes, int M, bool Shared>
void cross_blocks(RowSource x, const Coded& w, float* c, ptrdiff_t ldc, int accumulate) {
  constexpr int V = smaller(M <= 2 ? 4 : M <= 4 ? 2 : 1, kCacheLine / Codes::kBytes);
  uint32_t terms[kBlock / GemvTraits::kRows * M];
  const ptrdiff_t far = kBlock * w.stride, row_bytes = w.cols / kLine * Codes::kBytes;
  const auto near = [&](int j) {  // behind the last line of a row comes the next block
    const ptrdiff_t bytes = smaller(kNear, static_cast<int>(row_bytes));
    return bytes + (j / kLine * Codes::kBytes + bytes < row_bytes ? 0 : far - row_bytes);
  };
  for (int p = 0; p < w.rows; p += kBlock) {
    const int rows = smaller(kBlock, w.rows - p);
    for (int i = 0; i < M; ++i) GemvTraits::keep_terms(source_row(x, i) + p, rows, terms + i, M);
    int j = 0;
    for (; j + V * kLine <= w.cols; j += V * kLine)
      coded_cross_tile<Codes, M, V, Shared>(terms, rows, w, p, j, far, near(j), c + j, ldc,
                                            accumulate || p > 0);
    for (; j < w.cols; j += kLine)
      coded_cross_tile<Codes, M, 1, Shared>(terms, rows, w, p, j, far, near(j), c + j, ldc,
                                            accumulate || p > 0);
  }
}

template <class Codes, int M>
void coded_nn(RowSource x, const Coded& w, float* c, ptrdiff_t ldc, int accumulate) {
  if constexpr (Codes::kScales == 1)
    if (w.scale_stride == 0) return cross_blocks<Codes, M, true>(x, w, c, ldc, accumulate);
  cross_blocks<Codes, M, false>(x, w, c, ldc, accumulate);
}

using CodedProduct = void(int rows, RowSource x, const Coded& w, float* c, ptrdiff_t ldc, int accumulate);

struct Nt {
  template <class Codes>
  static void multiply(int rows, RowSource x, const Coded& w, float* c, ptrdiff_t ldc, int accumulate) {
    with_constant<kGemvRows>(rows, [&](auto m) { coded_nt<Codes, m.value>(x, w, c, ldc, accumulate); });
  }
  static bool takes(const CodedRows& w) { return w.cols % kLine == 0; }
};

struct Nn {
  template <class Codes>
  static void multiply(int rows, RowSource x, const Coded& w, float* c, ptrdiff_t ldc, int accumulate) {
    with_constant<kGemvRows>(rows, [&](auto m) { coded_nn<Codes, m.value>(x, w, c, ldc, accumulate); });
  }
  static bool takes(const CodedRows& w) { return w.cols % kLine == 0 && w.rows % GemvTraits::kRows == 0; }
};

template <class Direction, template <ScaleType> class Codes>
CodedProduct* by_scale(ScaleType scale) {
  switch (scale) {
    case ScaleType::f32: return Direction::template multiply<Codes<ScaleType::f32>>;
    case ScaleType::bf16: return Direction::template multiply<Codes<ScaleType::bf16>>;
    default: return nullptr;
  }
}

template <ScaleType Kind>
using Int8Codes = ByteCodes<Int8, Kind>;
template <ScaleType Kind>
using Fp8Codes = ByteCodes<Fp8, Kind>;
template <ScaleType Kind>
using PlainInt4 = Int4Codes<Kind, false>;
template <ScaleType Kind>
using ZerosInt4 = Int4Codes<Kind, true>;

// The product of a type of codes, or null.
template <class Direction, CodeType Type>
CodedProduct* product_of(const CodedRows& w) {
  if constexpr (Type == CodeType::int8) return by_scale<Direction, Int8Codes>(w.scale_type);
  if constexpr (Type == CodeType::e4m3) return by_scale<Direction, Fp8Codes>(w.scale_type);
  if constexpr (Type == CodeType::int4)
    return w.zeros ? by_scale<Direction, ZerosInt4>(w.scale_type)
                   : by_scale<Direction, PlainInt4>(w.scale_type);
  if constexpr (Type == CodeType::e2m1) {
    if (w.scale_type == ScaleType::e4m3 && w.group == kLine / 2)
      return Direction::template multiply<Nvfp4Codes>;
    return w.scale_type == ScaleType::e8m0 ? Direction::template multiply<Mxfp4Codes> : nullptr;
  }
}

template <class Direction, CodeType Type>
int coded(int rows, RowSource x, const CodedRows& w, float* c, ptrdiff_t ldc, int accumulate) {
  CodedProduct* product = product_of<Direction, Type>(w);
  if (product == nullptr || !Direction::takes(w) || !scales_are_ordinary(w)) return 0;
  float scale_values[kScaleValues];
  if (w.scale_type == ScaleType::e4m3) {
    uint8_t all[kScaleValues];
    for (int i = 0; i < kScaleValues; ++i) all[i] = static_cast<uint8_t>(i);
    CodedRows scales = w;
    scales.scales = all;
    load_scales(scales, 0, kScaleValues, scale_values);
  }
  product(rows, x, {w, scale_values}, c, ldc, accumulate);
  return 1;
}

// In the order of CodeType.
template <class Direction>
constexpr CodedGemv* kByType[kCodeTypes] = {
    nullptr,
    coded<Direction, CodeType::int8>,
    coded<Direction, CodeType::int4>,
    coded<Direction, CodeType::e4m3>,
    coded<Direction, CodeType::e2m1>,
};

constexpr CodedGemvKernels coded_gemv = {kByType<Nt>, kByType<Nn>};

}  // namespace

const GemvKernels gemv = {gemv_nt<GemvTraits>, gemv_nn<GemvTraits>, &coded_gemv};

}  // namespace kt::avx512_bf16
