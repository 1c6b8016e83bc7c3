// The table of kernels an instruction set provides. This is the only project header that files under
// kernels/<isa>/ may include, so it holds plain types and no inline functions: nothing compiled with -m flags
// can leak into the rest of the library.
//
// Every kernel works on one panel, one tile or one row; the loops around them live in gemm/ and moe/.
// Kernels never fail, never allocate and never look at the CPU.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt {

// Rows of a bf16 matrix for packing: row i starts at base + (index ? index[i] : i) * stride.
struct RowSource {
  const uint16_t* base;
  ptrdiff_t stride;
  const int32_t* index;
};

// C[mr x nr] (+)= A[mr x k] * B[k x nr], operands bf16 in value, accumulation fp32.
//
// Packed panels: an A panel holds mr rows, a B panel nr columns; both are zero-filled up to mr / nr and to a
// multiple of k_align in k, take (mr or nr) * round_up(k, k_align) * element_bytes bytes, and their order
// inside is the kernel set's own business.
struct GemmKernels {
  int mr, nr;
  int k_align;
  int element_bytes;  // 2: panels hold bf16; 4: panels hold the same values as fp32

  // A panel from `rows` <= mr rows that run along k.
  void (*pack_a)(RowSource src, int rows, int k, void* panel);
  // B panel from `cols` <= nr rows of the source that run along k (a weight in the forward direction).
  void (*pack_b_cols)(RowSource src, int cols, int k, void* panel);
  // B panel from k rows of the source that run along n (the same weight in the backward direction).
  void (*pack_b_rows)(RowSource src, int k, int cols, void* panel);
  // rows <= mr and cols <= nr are what is wanted; C may be written up to nr columns, never past `rows` rows.
  void (*micro_kernel)(int rows, int cols, int k, const void* a, const void* b, float* c, ptrdiff_t ldc,
                       int accumulate);
  // Around micro-kernel calls of one thread, for units that must be set up; null where there is nothing to do.
  void (*begin)();
  void (*end)();
};

// One row of G and U of an expert, and what the step makes of it. Forward: h = act(G) * U; G, U and h rounded
// once to bf16. Backward: from dh' (fp32, before the routing weight) and the saved G, U.
struct ActivationKernels {
  void (*forward)(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h);
  // dG, dU for dh = weight * dh'; h as in the forward. Returns <dh', h>, the gradient of the routing weight.
  float (*backward)(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
                    uint16_t* du, uint16_t* h);
};

struct EpilogueKernels {
  // dst[j * dst_stride + i] = src[i * src_stride + j] for i < rows, j < cols.
  void (*transpose)(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst,
                    ptrdiff_t dst_stride);
  void (*add_scaled)(int n, float scale, const float* x, float* y);       // y += scale * x
  void (*round_scaled)(int n, float scale, const float* x, uint16_t* y);  // y = bf16(scale * x)
  ActivationKernels silu;
};

// Stored weights and parameters to bf16, one row at a time.
struct DecodeKernels {
  void (*from_f32)(int n, const float* src, uint16_t* dst);
  void (*from_f16)(int n, const uint16_t* src, uint16_t* dst);
};

// A null gemm.micro_kernel, or any other null slot, takes the next lower set's (the gemm slots go together).
struct KernelSet {
  GemmKernels gemm;
  EpilogueKernels epilogue;
  DecodeKernels decode;
};

}  // namespace kt
