// Products of matrices packed for the micro-kernel: C = sum of A_i * B_i in one fp32 result, the loops around
// the micro-kernel. LoRA enters as further terms of the sum, so nothing rounded is ever read back and added
// to. Pure: no threads; memory comes from the caller's arena.
#pragma once

#include <cstdint>
#include <span>

#include "base/memory.h"
#include "base/view.h"
#include "gemm/decode.h"
#include "kernels/kernel_set.h"

namespace kt {

// Rows of a matrix, in order or picked by an index (a gather that costs nothing: packing copies anyway).
struct Rows {
  MatView matrix;                       // bf16, or fp32 to be rounded to bf16 (then without an index)
  const std::int32_t* index = nullptr;  // matrix.rows entries
};

// A, rows x k, as the micro-kernel reads it: panels of mr rows, or rows of a matrix where they lie.
struct PackedA {
  const char* data = nullptr;
  index_t rows = 0, k = 0, panel_bytes = 0;
  index_t row_bytes = 0;  // from one row of a matrix to the next; 0: panels
};

// k x cols, cut into panels of nr columns.
struct PackedB {
  const char* data = nullptr;
  index_t cols = 0, k = 0, panel_bytes = 0;
};

// A = source [rows, k]: itself where the kernels read rows where they lie (it must outlive the result), else
// packed.
PackedA pack_a(const KernelSet& kernels, Rows source, Arena& scratch);
// B = source', source [cols, k].
PackedB pack_b_cols(const KernelSet& kernels, Rows source, Arena& scratch);
// B = source [k, cols].
PackedB pack_b_rows(const KernelSet& kernels, Rows source, Arena& scratch);

// A weight as A, and as B = weight [k, cols].
PackedA pack_a(const KernelSet& kernels, const WeightBlock& weight, Arena& scratch);
PackedB pack_b_rows(const KernelSet& kernels, const WeightBlock& weight, Arena& scratch);

// The same from bf16 into memory of the caller's, as many bytes as packed_a_bytes and packed_b_bytes say.
PackedA pack_a_into(char* panels, const KernelSet& kernels, Rows source);
PackedB pack_b_cols_into(char* panels, const KernelSet& kernels, Rows source);
PackedB pack_b_rows_into(char* panels, const KernelSet& kernels, Rows source);
index_t packed_a_bytes(const KernelSet& kernels, index_t rows, index_t k);
index_t packed_b_bytes(const KernelSet& kernels, index_t cols, index_t k);

// Some rows of A or columns of B; the range starts at a panel.
PackedA rows_of(const KernelSet& kernels, PackedA a, Range rows);
PackedB cols_of(const KernelSet& kernels, PackedB b, Range cols);

struct Term {
  PackedA a;
  PackedB b;
  MatView next = {};  // what the caller needs next: sets that gain by it prefetch it into L2 meanwhile
};

// The rows of `next` that a product of `part` of `whole` rows prefetches.
inline MatView share(const MatView& next, Range part, index_t whole) {
  const index_t begin = next.rows * part.begin / whole, end = next.rows * part.end / whole;
  return next.block(begin, 0, end - begin, next.cols);
}

inline constexpr std::size_t kMostTerms = 132;  // of one sum

// Batch-reduce GEMM: c[a.rows x b.cols] = (accumulate ? c : 0) + sum of the terms, which agree in a.rows and
// in b.cols. Rows of c are `ldc` floats apart, at least min_ldc(kernels, b.cols); what lies behind b.cols is
// scratch.
void brgemm(const KernelSet& kernels, std::span<const Term> terms, float* c, index_t ldc,
            bool accumulate = false);
index_t min_ldc(const KernelSet& kernels, index_t cols);

// Products of at most kGemvRows rows of x, from natural order: c[x.rows x w.rows]
// (+)= x w' and c[x.rows x w.cols] (+)= x w. Weights are read once and not packed. Rows of c are `ldc` floats
// apart.
void gemv_nt(const KernelSet& kernels, Rows x, Rows w, float* c, index_t ldc, bool accumulate,
             Arena& scratch);
void gemv_nn(const KernelSet& kernels, Rows x, Rows w, float* c, index_t ldc, bool accumulate,
             Arena& scratch);
void gemv_nt(const KernelSet& kernels, Rows x, const WeightBlock& w, float* c, index_t ldc, bool accumulate,
             Arena& scratch);
void gemv_nn(const KernelSet& kernels, Rows x, const WeightBlock& w, float* c, index_t ldc, bool accumulate,
             Arena& scratch);

}  // namespace kt
