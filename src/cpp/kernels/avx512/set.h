// What the files of this kernel set share beside the register helpers.
#pragma once

#include "kernels/avx512/tile.h"

namespace kt::avx512 {

constexpr int MR = kTileRows, NR = kTileCols;
constexpr int KB = kRun;  // k in one 64-byte run of a packed A row

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

}  // namespace kt::avx512
