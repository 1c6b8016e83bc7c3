// The table of kernels an instruction set provides. Of the project's headers, files under kernels/<isa>/ may
// include this one and those of kernel folders, so it holds plain types and no inline functions: nothing
// compiled with -m flags can leak into the rest of the library.
//
// Every kernel works on one panel, one tile or one row; the loops around them live in gemm/ and moe/.
// Kernels never fail, never allocate and never look at the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "base/code_type.h"

// For functions and lambdas of kernels that have to be inlined.
#define KT_INLINE __attribute__((always_inline)) inline
#define KT_INLINE_LAMBDA __attribute__((always_inline))

namespace kt {

// Rows of a bf16 matrix for packing: row i starts at base + (index ? index[i] : i) * stride.
struct RowSource {
  const uint16_t* base;
  ptrdiff_t stride;
  const int32_t* index;
};

// A panel from `rows` <= mr rows that run along k; a B panel from `rows` <= nr of them (X and h in the
// forward direction, where weights are A).
using PackRows = void(RowSource src, int rows, int k, void* panel);
// B panels, panel_bytes apart, from k rows of the source that run along all their columns (P in the forward
// direction, weights in the backward direction).
using PackAcross = void(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes);
// Memory that the caller needs next, which a product prefetches while it runs: a matrix, row by row, so many
// lines of it for every 64 bytes of a row of A. The last lines may lie behind the matrix, so nothing may be
// read of them. A set whose products gain nothing by it ignores it.
struct Prefetch {
  const char* row;
  ptrdiff_t stride;  // bytes from one row to the next
  int row_lines;
  int line;            // the first to prefetch, of `row`
  int lines_per_step;  // 0: there is nothing to prefetch
};

// An element of a batch-reduce product: a panel of B, and of A a panel or rows where they lie, both k long. A
// product with LoRA is a batch of them, and its tile stays in registers from the first to the last.
struct BatchElement {
  const void *a, *b;
  ptrdiff_t a_stride;  // 0: `a` is a panel; else rows of a bf16 matrix, so many bytes apart
  int k;
  Prefetch prefetch;
};
// rows <= mr and cols <= nr are what is wanted; C may be written up to nr columns, never past `rows` rows.
using MicroKernel = void(int rows, int cols, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                         int accumulate);

// What the set's multiply-add reaches without memory: `rounds` times into each of as many accumulators as
// hide its latency. Both operands and the accumulators start from `registers` (kPeakBytes, 64-byte aligned,
// every 32 bits a pair of bf16 that is also an fp32), where the accumulators end. Returns the multiplications
// and additions done.
constexpr int kPeakBytes = 8192;
using Peak = double(int rounds, void* registers);

// C[mr x nr] (+)= sum of A[mr x k] * B[k x nr] over batch, operands bf16 in value, accumulation fp32. Whether
// C is what the sum starts from, or is added at its end, is up to the kernel set.
//
// Packed panels: an A panel holds mr rows, a B panel nr columns. What is behind the last row or column is
// arbitrary and reaches only results that nobody wants; behind k there are zeros as far as the micro-kernel
// reads. They take (mr or nr) * round_up(k, k_align) * element_bytes bytes, and their order
// inside is the kernel set's own business.
struct GemmKernels {
  int mr, nr;
  int k_align;
  int element_bytes;  // 2: panels hold bf16; 4: panels hold the same values as fp32

  PackRows* pack_a;
  PackRows* pack_b_cols;
  PackAcross* pack_b_rows;
  MicroKernel* micro_kernel;
  int max_edge = 0;      // rows behind whole tiles that are cheaper as a GEMV than as a tile
  Peak* peak = nullptr;  // null: the micro-kernel itself is all there is
  // A may be rows of a bf16 matrix where they lie, at any even address, if k is even; nothing behind k is
  // read.
  bool in_place = false;
  // Around micro-kernel calls of one thread, for units that must be set up; null where there is nothing to
  // do.
  void (*begin)() = nullptr;
  void (*end)() = nullptr;
};

// Most rows whose products are a GEMV's: arithmetic takes as long as memory there.
constexpr int kGemvRows = 8;

// A product of 1 to kGemvRows rows, straight from natural row-major matrices: nothing of W is packed, and
// each of its elements is read from memory once. n, k >= 1. An element's additions run in an order that only
// the number of rows and k decide: the same bits whatever columns of C a caller computes at a time.
using Gemv = void(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride, float* c,
                  ptrdiff_t ldc, int accumulate);

// A block of rows of quantised weights (base/weight.h has the formats).
struct CodedRows {
  int rows, cols;
  const uint8_t* codes;
  ptrdiff_t stride;        // bytes from one row to the next
  ScaleType scale_type;    // not none
  const void* scales;      // of the first column's group
  ptrdiff_t scale_stride;  // in scales, from one row's to the next one's; 0: all rows have the same
  const uint8_t* zeros;    // int4: zero points, where the scales lie; null: 8
  int group;  // columns that share a scale: at least `cols`, a multiple of 32, or with e2m1 codes 16
  // e4m3 scales: what each is multiplied or divided by.
  float global_scale = 1;
  bool divides = false;
};

// The same where W is codes, decoded in registers: bit for bit the product with what DecodeCodes makes of
// them, where `nn` adds up 32 rows of W at a time, and each such sum to C. 0: nothing was done, for a kernel
// need not take every shape nor every scale.
using CodedGemv = int(int rows, RowSource x, const CodedRows& w, float* c, ptrdiff_t ldc, int accumulate);

// By the type of W's codes, [kCodeTypes]; null: decode, then multiply.
struct CodedGemvKernels {
  CodedGemv *const *nt, *const *nn;
};

struct GemvKernels {
  Gemv* nt;  // C[rows x n] (+)= X[rows x k] * W', W [n x k]: a weight going forward
  Gemv* nn;  // C[rows x n] (+)= X[rows x k] * W, W [k x n]: the same weight going backward
  const CodedGemvKernels* coded = nullptr;
};

// What experts make of G and U, h = act(G, U) = value(G) * factor(U), or without a gate of U alone, h =
// act(U) = value(U). A table has one entry for each, in this order.
enum class Activation : uint8_t { silu, gpt_oss, clamped_silu, gelu_tanh, gelu, softcapped_silu, relu2 };
constexpr int kActivationCount = 7;
constexpr const char* kActivationNames[kActivationCount] = {
    "silu", "gpt_oss", "clamped_silu", "gelu_tanh", "gelu", "softcapped_silu", "relu2"};

// gpt-oss: h = (clamp(U, -limit, limit) + 1) * g * sigmoid(alpha * g), g = min(G, limit).
constexpr float kGptOssAlpha = 1.702f, kGptOssLimit = 7.0f;
// Clamped SiLU, DeepSeek-V4's: h = silu(min(G, limit)) * clamp(U, -limit, limit).
constexpr float kClampedSiluLimit = 10.0f;
// What lies beyond a limit gets no gradient, what lies on it does; so a G or U beyond is saved times this, or
// rounding might put it on the limit. Its own value matters no more.
constexpr float kBeyondLimit = 1.00390625f;
// GELU by tanh: h = g * (1 + tanh(sqrt(2 / pi) * (g + cubic * g^3))) / 2 * U, which is g * sigmoid(slope * (g
// + cubic * g^3)) * U with slope = 2 * sqrt(2 / pi). From `far` on the sigmoid is 0 or 1.
constexpr float kGeluSlope = 1.5957691216f, kGeluCubic = 0.044715f, kGeluFar = 16.0f;
// Inkling 2's: h = cap(G, gate) * sigmoid(G) * cap(U, up), where cap(x, c) = c * tanh(x / c).
constexpr float kGateSoftcap = 4.0f, kUpSoftcap = 25.0f;

// One row of G and U of an expert: G, U and h rounded once to bf16. Lines that G and U fill may go past the
// caches: before another thread reads them comes a locked instruction or a fence. Without a gate nothing is
// read or written of G, here and below.
using ActivationForward = void(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved,
                               uint16_t* h);
// Backward, from dh (fp32, before the routing weight) and the saved G, U: dG, dU for weight * dh, and h of
// the rounded G, U. Returns <dh, h> with h in fp32, the gradient of the routing weight.
using ActivationBackward = float(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u,
                                 uint16_t* dg, uint16_t* du, uint16_t* h);

struct ActivationKernels {
  ActivationForward* forward;
  ActivationBackward* backward;
};

struct ActivationTable {
  ActivationKernels gated[kActivationCount], ungated[kActivationCount];
};

// dst[j * dst_stride + i] = src[i * src_stride + j] for i < rows, j < cols.
using Transpose = void(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst,
                       ptrdiff_t dst_stride);
// y = sum of scale[j] * x[j], j < count, in order; y may be one of x.
using SumScaled = void(int n, int count, const float* const* x, const float* scale, float* y);
using RoundScaled = void(int n, float scale, const float* x, uint16_t* y);  // y = bf16(scale * x)

struct EpilogueKernels {
  Transpose* transpose;
  SumScaled* sum_scaled;
  RoundScaled* round_scaled;
  const ActivationTable* activations;
};

// Stored weights and parameters to bf16, one row at a time.
using DecodeF32 = void(int n, const float* src, uint16_t* dst);
using DecodeF16 = void(int n, const uint16_t* src, uint16_t* dst);

// dst[i * dst_stride + j] = bf16(value of the code * scale): one product in fp32, rounded to nearest even.
// Every kernel set gives the same bits, NaNs' payloads aside.
using DecodeCodes = void(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride);

struct DecodeKernels {
  DecodeF32* from_f32;
  DecodeF16* from_f16;
  DecodeCodes* from_codes[kCodeTypes] = {};  // by the type of codes; bf16 has none
};

// What an instruction set has of its own. Null, also a slot of the epilogue or of decode: the set before it
// has it.
struct OwnKernels {
  const GemmKernels* gemm = nullptr;
  const GemvKernels* gemv = nullptr;
  const EpilogueKernels* epilogue = nullptr;
  const DecodeKernels* decode = nullptr;
};

// All that it computes with.
struct KernelSet {
  GemmKernels gemm;
  GemvKernels gemv;
  EpilogueKernels epilogue;
  DecodeKernels decode;
};

}  // namespace kt
