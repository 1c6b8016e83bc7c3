// What the files of this kernel set share beside the register helpers.
#pragma once

#include "kernels/avx512/registers.h"

namespace kt::avx512 {

constexpr int MR = 12;  // with NR: 24 accumulators, 2 vectors of B and 1 broadcast of A in 32 registers
constexpr int NR = 32;  // two vectors
constexpr int KB = 16;  // k in one 64-byte run of a packed A row

void pack_a(RowSource src, int rows, int k, void* panel);
void pack_b_cols(RowSource src, int cols, int k, void* panel);
void pack_b_rows(RowSource src, int k, int cols, void* panel);
void micro_kernel(int rows, int cols, int k, const void* a, const void* b, float* c, ptrdiff_t ldc,
                  int accumulate);

void transpose(const float* src, ptrdiff_t src_stride, int rows, int cols, float* dst, ptrdiff_t dst_stride);
void add_scaled(int n, float scale, const float* x, float* y);
void round_scaled(int n, float scale, const float* x, uint16_t* y);
void silu_forward(int n, const float* g, const float* u, uint16_t* g_saved, uint16_t* u_saved, uint16_t* h);
float silu_backward(int n, const float* dh, float weight, const uint16_t* g, const uint16_t* u, uint16_t* dg,
                    uint16_t* du, uint16_t* h);

void from_f32(int n, const float* src, uint16_t* dst);
void from_f16(int n, const uint16_t* src, uint16_t* dst);

}  // namespace kt::avx512
