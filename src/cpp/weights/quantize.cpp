#include "weights/quantize.h"
namespace kt {
WeightType default_type(Format format) {
  switch (format) {
    case Format::bf16: return {};
    case Format::int8: return {Format::int8, ScaleType::f32};
    case Format::int4: return {Format::int4, ScaleType::bf16, 1, 32};
    case Format::fp8: return {Format::fp8, ScaleType::f32, 128, 128};
    case Format::mxfp4: return {Format::mxfp4, ScaleType::e8m0, 1, 32};
  }
  return {};
}
QuantError quantize(const KernelSet&, const MatView&, const MutableWeight&) { throw ValueError("not yet"); }
}  // namespace kt
