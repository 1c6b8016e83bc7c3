#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

const uint16_t* row(RowSource src, int i) { return src.base + (src.index ? src.index[i] : i) * src.stride; }

// panel[p][i] = row i at p, for `width` rows of which `rows` exist.
void interleave_rows(RowSource src, int rows, int width, int k, float* panel) {
  for (int i = 0; i < width; ++i)
    for (int p = 0; p < k; ++p) panel[p * width + i] = i < rows ? widen(row(src, i)[p]) : 0.0f;
}

}  // namespace

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
        panel[p * NR + j] = first + j < cols ? widen(row(src, p)[first + j]) : 0.0f;
  }
}

}  // namespace kt::scalar
