#include <string.h>

#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, exponent = half >> 10 & 0x1f, mantissa = half & 0x3ff;
  if (exponent == 31) return from_bits(sign | 0x7f800000u | mantissa << 13);
  if (exponent != 0) return from_bits(sign | (exponent + 112) << 23 | mantissa << 13);
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

}  // namespace

float widen(uint16_t bits) { return from_bits(uint32_t{bits} << 16); }

uint16_t round(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN, made quiet
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void from_f32(int n, const float* src, uint16_t* dst) {
  for (int i = 0; i < n; ++i) dst[i] = round(src[i]);
}

void from_f16(int n, const uint16_t* src, uint16_t* dst) {
  for (int i = 0; i < n; ++i) dst[i] = round(half_to_float(src[i]));
}

}  // namespace kt::scalar
