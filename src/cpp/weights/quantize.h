#pragma once
#include "base/weight.h"
#include "kernels/kernel_set.h"
namespace kt {
struct QuantError {
  double error = 0, norm = 0;
};
WeightType default_type(Format format);
QuantError quantize(const KernelSet& kernels, const MatView& source, const MutableWeight& into);
}  // namespace kt
