#include "gemm/gemm.h"

#include <cassert>

#include "base/split.h"

namespace kt {

namespace {

const std::uint16_t* bf16(const void* data) { return static_cast<const std::uint16_t*>(data); }

// The source in bf16: itself, or a rounded copy in scratch.
Rows in_bf16(const KernelSet& kernels, Rows source, Arena& scratch) {
  const MatView& m = source.matrix;
  if (m.dtype == DType::bf16) return source;
  assert(m.dtype == DType::f32 && source.index == nullptr);
  auto* copy = scratch.take<std::uint16_t>(m.rows * m.cols);
  for (index_t i = 0; i < m.rows; ++i)
    kernels.decode.from_f32(static_cast<int>(m.cols), static_cast<const float*>(m.at(i, 0)),
                            copy + i * m.cols);
  return {view(copy, DType::bf16, m.rows, m.cols)};
}

RowSource from_row(const Rows& source, index_t row) {
  const MatView& m = source.matrix;
  if (source.index != nullptr) return {bf16(m.data), m.stride, source.index + row};
  return {bf16(m.at(row, 0)), m.stride, nullptr};
}

index_t panel_bytes(const GemmKernels& gemm, index_t width, index_t k) {
  return round_up(width * round_up(k, gemm.k_align) * gemm.element_bytes, 64);
}

// Panels of `width` rows each, which run along k.
template <class Packed>
Packed pack_rows(const KernelSet& kernels, PackRows* pack, int width, Rows source, Arena& scratch) {
  source = in_bf16(kernels, source, scratch);
  const index_t rows = source.matrix.rows, k = source.matrix.cols;
  const index_t bytes = panel_bytes(kernels.gemm, width, k);
  char* data = scratch.take<char>(ceil_div(rows, width) * bytes);
  for (index_t i = 0; i < rows; i += width)
    pack(from_row(source, i), static_cast<int>(std::min<index_t>(width, rows - i)), static_cast<int>(k),
         data + i / width * bytes);
  return {data, rows, k, bytes};
}

}  // namespace

PackedA pack_a(const KernelSet& kernels, Rows source, Arena& scratch) {
  return pack_rows<PackedA>(kernels, kernels.gemm.pack_a, kernels.gemm.mr, source, scratch);
}

PackedB pack_b_cols(const KernelSet& kernels, Rows source, Arena& scratch) {
  return pack_rows<PackedB>(kernels, kernels.gemm.pack_b_cols, kernels.gemm.nr, source, scratch);
}

PackedB pack_b_rows(const KernelSet& kernels, Rows source, Arena& scratch) {
  const GemmKernels& gemm = kernels.gemm;
  source = in_bf16(kernels, source, scratch);
  const index_t k = source.matrix.rows, cols = source.matrix.cols, bytes = panel_bytes(gemm, gemm.nr, k);
  char* data = scratch.take<char>(ceil_div(cols, gemm.nr) * bytes);
  RowSource rows = from_row(source, 0);
  for (index_t j = 0; j < cols; j += gemm.nr, rows.base += gemm.nr)
    gemm.pack_b_rows(rows, static_cast<int>(k), static_cast<int>(std::min<index_t>(gemm.nr, cols - j)),
                     data + j / gemm.nr * bytes);
  return {data, cols, k, bytes};
}

void multiply(const KernelSet& kernels, std::span<const Term> terms, float* c, bool accumulate) {
  const GemmKernels& gemm = kernels.gemm;
  const index_t rows = terms.front().a.rows, cols = terms.front().b.cols,
                stride = result_stride(kernels, cols);
  if (gemm.begin != nullptr) gemm.begin();
  for (index_t j = 0; j < cols; j += gemm.nr)  // a B panel stays in the nearest cache while A passes by
    for (index_t i = 0; i < rows; i += gemm.mr) {
      bool add = accumulate;
      for (const Term& term : terms) {
        assert(term.a.rows == rows && term.b.cols == cols && term.a.k == term.b.k);
        gemm.micro_kernel(static_cast<int>(std::min<index_t>(gemm.mr, rows - i)),
                          static_cast<int>(std::min<index_t>(gemm.nr, cols - j)), static_cast<int>(term.a.k),
                          term.a.data + i / gemm.mr * term.a.panel_bytes,
                          term.b.data + j / gemm.nr * term.b.panel_bytes, c + i * stride + j, stride, add);
        add = true;
      }
    }
  if (gemm.end != nullptr) gemm.end();
}

index_t result_stride(const KernelSet& kernels, index_t cols) { return round_up(cols, kernels.gemm.nr); }

}  // namespace kt
