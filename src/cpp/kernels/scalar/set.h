// What the files of this kernel set share.
#pragma once

#include "kernels/kernel_set.h"

namespace kt::scalar {

constexpr int MR = 4, NR = 16;

float widen(uint16_t bits);   // bf16 to fp32, exact
uint16_t round(float value);  // fp32 to bf16, nearest even, a NaN stays a NaN

PackRows pack_a, pack_b_cols;
PackAcross pack_b_rows;
MicroKernel micro_kernel;
Gemv gemv_nt, gemv_nn;

Transpose transpose;
SumScaled sum_scaled;
RoundScaled round_scaled;
extern const ActivationTable activations;

DecodeF32 from_f32;
DecodeF16 from_f16;
DecodeCodes from_int8, from_int4, from_e4m3, from_e2m1;

}  // namespace kt::scalar
