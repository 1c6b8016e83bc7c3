// Quantisation on load: codes and scales for weights in full precision, chosen for a small squared error.
// Refuses what is not finite. Pure: no threads; the same bits from every kernel set.
#pragma once

#include <array>

#include "base/view.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"

namespace kt {

// Sums over weights, of squares: of what decoding differs by, and of the weight. The relative error of
// several matrices is sqrt(sum of error / sum of norm).
struct QuantError {
  double error = 0, norm = 0;
};
using QuantErrors = std::array<QuantError, projections.size()>;  // of gate, up and down

// Fills all of `into` from a bf16 or fp32 matrix of its shape. Its type is the format's own in the table of
// base/weight.h, or another one that the format's grid takes (grids.h). Where all weights of a scale are
// zero, it is 1. ValueError for other types and shapes, and for a weight that is not finite (naming its row
// and column).
QuantError quantize(const KernelSet& kernels, const MatView& source, const MutableWeight& into);

}  // namespace kt
