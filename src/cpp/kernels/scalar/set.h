// What the files of this kernel set share.
#pragma once

#include "kernels/kernel_set.h"

namespace kt::scalar {

constexpr int MR = 4, NR = 16;

float widen(uint16_t bits);   // bf16 to fp32, exact
uint16_t round(float value);  // fp32 to bf16, nearest even, a NaN stays a NaN

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

}  // namespace kt::scalar
