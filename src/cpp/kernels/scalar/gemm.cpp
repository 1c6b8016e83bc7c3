// The readable truth: every other set is tested against this one.
#include "kernels/generic/pack.h"
#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

constexpr int MR = 4, NR = 16;

// panel[p][i] = row i at p, for `width` rows of which `rows` exist.
void interleave_rows(RowSource src, int rows, int width, int k, float* panel) {
  for (int i = 0; i < width; ++i)
    for (int p = 0; p < k; ++p) panel[p * width + i] = i < rows ? widen(source_row(src, i)[p]) : 0.0f;
}

// W [n x k] or [k x n] by the distance between neighbours in n and in k.
void multiply(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t n_stride, ptrdiff_t k_stride,
              float* c, ptrdiff_t ldc, int accumulate) {
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < n; ++j) {
      float sum = 0.0f;
      for (int p = 0; p < k; ++p) sum += widen(source_row(x, i)[p]) * widen(w[j * n_stride + p * k_stride]);
      c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + sum;
    }
}

void pack_a(RowSource src, int rows, int k, void* panel) {
  interleave_rows(src, rows, MR, k, static_cast<float*>(panel));
}

void pack_b_cols(RowSource src, int cols, int k, void* panel) {
  interleave_rows(src, cols, NR, k, static_cast<float*>(panel));
}

void pack_b_rows(RowSource src, int k, int cols, void* panels, ptrdiff_t panel_bytes) {
  for (int first = 0; first < cols; first += NR) {
    float* panel = reinterpret_cast<float*>(static_cast<char*>(panels) + first / NR * panel_bytes);
    for (int p = 0; p < k; ++p)
      for (int j = 0; j < NR; ++j)
        panel[p * NR + j] = first + j < cols ? widen(source_row(src, p)[first + j]) : 0.0f;
  }
}

void gemv_nt(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride, float* c,
             ptrdiff_t ldc, int accumulate) {
  multiply(rows, n, k, x, w, w_stride, 1, c, ldc, accumulate);
}

void gemv_nn(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride, float* c,
             ptrdiff_t ldc, int accumulate) {
  multiply(rows, n, k, x, w, 1, w_stride, c, ldc, accumulate);
}

// Panels hold fp32: A as [k][MR], B as [k][NR].
void micro_kernel(int rows, int, const BatchElement* batch, int count, float* c, ptrdiff_t ldc,
                  int accumulate) {
  float sum[MR][NR] = {};
  for (const BatchElement* element = batch; element != batch + count; ++element) {
    const float* a = static_cast<const float*>(element->a);
    const float* b = static_cast<const float*>(element->b);
    for (int p = 0; p < element->k; ++p)
      for (int i = 0; i < MR; ++i)
        for (int j = 0; j < NR; ++j) sum[i][j] += a[p * MR + i] * b[p * NR + j];
  }
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < NR; ++j) c[i * ldc + j] = (accumulate ? c[i * ldc + j] : 0.0f) + sum[i][j];
}

constexpr GemmKernels gemm = {.mr = MR,
                              .nr = NR,
                              .k_align = 1,
                              .element_bytes = sizeof(float),
                              .pack_a = pack_a,
                              .pack_b_cols = pack_b_cols,
                              .pack_b_rows = pack_b_rows,
                              .micro_kernel = micro_kernel};

constexpr GemvKernels gemv = {gemv_nt, gemv_nn};

}  // namespace

extern const OwnKernels kernels;
const OwnKernels kernels = {.gemm = &gemm, .gemv = &gemv, .epilogue = &epilogue, .decode = &decode};

}  // namespace kt::scalar
