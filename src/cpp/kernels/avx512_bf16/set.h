// What the files of this kernel set share.
#pragma once

#include "kernels/avx512/registers.h"

namespace kt::avx512_bf16 {

constexpr int MR = 12;  // with NR: 24 accumulators, 2 vectors of B and 1 broadcast of A in 32 registers
constexpr int NR = 32;  // two vectors
constexpr int KB = 32;  // k in one 64-byte run of a packed A row

void pack_a(RowSource src, int rows, int k, void* panel);
void pack_b_cols(RowSource src, int cols, int k, void* panel);
void pack_b_rows(RowSource src, int k, int cols, void* panel);
void micro_kernel(int rows, int cols, int k, const void* a, const void* b, float* c, ptrdiff_t ldc,
                  int accumulate);

}  // namespace kt::avx512_bf16
