// What the files of this kernel set share beside the register helpers.
#pragma once

#include "kernels/avx512/registers.h"

namespace kt::avx512 {

constexpr int MR = 12;  // with NR: 24 accumulators, 2 vectors of B and 1 broadcast of A in 32 registers
constexpr int NR = 32;  // two vectors
constexpr int KB = 16;  // k in one 64-byte run of a packed A row

PackRows pack_a, pack_b_cols;
PackAcross pack_b_rows;
MicroKernel micro_kernel;

Transpose transpose;
AddScaled add_scaled;
RoundScaled round_scaled;
ActivationForward silu_forward;
ActivationBackward silu_backward;

DecodeF32 from_f32;
DecodeF16 from_f16;

}  // namespace kt::avx512
