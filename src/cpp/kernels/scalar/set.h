// What the files of this kernel set share, and other sets use of it.
#pragma once

#include "kernels/kernel_set.h"

namespace kt::scalar {

float widen(uint16_t bits);          // bf16 to fp32, exact
float half_to_float(uint16_t half);  // fp16 to fp32, exact
uint16_t round(float value);         // fp32 to bf16, nearest even, a NaN stays a NaN

DecodeCodes from_int8, from_e4m3;

extern const EpilogueKernels epilogue;
extern const DecodeKernels decode;

}  // namespace kt::scalar
