// Products of packed matrices: C = sum of A_i * B_i in one fp32 result, the loops around the micro-kernel.
// LoRA enters as further terms of the sum, so nothing rounded is ever read back and added to.
// Pure: no threads; memory comes from the caller's arena.
#pragma once

#include <cstdint>
#include <span>

#include "base/arena.h"
#include "base/view.h"
#include "kernels/kernel_set.h"

namespace kt {

// Rows of a matrix, in order or picked by an index (a gather that costs nothing: packing copies anyway).
struct Rows {
  MatView matrix;                       // bf16, or fp32 to be rounded to bf16 (then without an index)
  const std::int32_t* index = nullptr;  // matrix.rows entries
};

// rows x k, cut into panels of mr rows.
struct PackedA {
  const char* data = nullptr;
  index_t rows = 0, k = 0, panel_bytes = 0;
};

// k x cols, cut into panels of nr columns.
struct PackedB {
  const char* data = nullptr;
  index_t cols = 0, k = 0, panel_bytes = 0;
};

// A = source [rows, k].
PackedA pack_a(const KernelSet& kernels, Rows source, Arena& scratch);
// B = source', source [cols, k].
PackedB pack_b_cols(const KernelSet& kernels, Rows source, Arena& scratch);
// B = source [k, cols].
PackedB pack_b_rows(const KernelSet& kernels, Rows source, Arena& scratch);

struct Term {
  PackedA a;
  PackedB b;
};

// c[a.rows x b.cols] = (accumulate ? c : 0) + sum of the terms, which agree in a.rows and in b.cols.
// A row of c holds result_stride(kernels, b.cols) floats; those behind b.cols are scratch.
void multiply(const KernelSet& kernels, std::span<const Term> terms, float* c, bool accumulate = false);
index_t result_stride(const KernelSet& kernels, index_t cols);

}  // namespace kt
