// Quantisation on load: codes and scales for weights in full precision, chosen for a small squared error.
// Refuses what is not finite. Pure: no threads; the same bits from every kernel set.
#pragma once

#include "base/view.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"

namespace kt {

// Sums over weights, of squares: of what decoding differs by, and of the weight. The relative error of
// several matrices is sqrt(sum of error / sum of norm).
struct QuantError {
  double error = 0, norm = 0;
};

// Fills all of `into` from a bf16 or fp32 matrix of its shape. Its type may be
//   int8   with f32 scales for a row or a multiple of 32 of its columns,
//   int4   with bf16 scales for 32, 64 or 128 columns of a row, without zero points,
//   fp8    with f32 scales for a row or 128 x 128,
//   mxfp4  with E8M0 scales for 32 columns of a row.
// Where all weights of a scale are zero, it is 1. ValueError for other types and shapes, and for a weight
// that is not finite (naming its row and column).
QuantError quantize(const KernelSet& kernels, const MatView& source, const MutableWeight& into);

}  // namespace kt
