#include "kernels/generic/groups.h"
#include "kernels/scalar/set.h"

namespace kt::scalar {

namespace {

// value(row of codes, column, place of the scale) is the number a code stands for.
template <class Value>
void decode_by(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride, Value value) {
  for (int i = 0; i < src.rows; ++i)
    for (int j = 0; j < src.cols; ++j) {
      const ptrdiff_t place = i * src.scale_stride + j / src.group;
      dst[i * dst_stride + j] = round(value(src.codes + i * src.stride, j, place) * scale_at(src, place));
    }
}

int nibble(const uint8_t* row, int j) { return row[j / 2] >> 4 * (j % 2) & 15; }

void from_f32(int n, const float* src, uint16_t* dst) {
  for (int i = 0; i < n; ++i) dst[i] = round(src[i]);
}

void from_f16(int n, const uint16_t* src, uint16_t* dst) {
  for (int i = 0; i < n; ++i) dst[i] = round(half_to_float(src[i]));
}

void from_int4(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  decode_by(src, dst, dst_stride, [&](const uint8_t* row, int j, ptrdiff_t place) {
    return static_cast<float>(nibble(row, j) - (src.zeros ? src.zeros[place] : 8));
  });
}

void from_e2m1(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  decode_by(src, dst, dst_stride, [](const uint8_t* row, int j, ptrdiff_t) { return kE2M1[nibble(row, j)]; });
}

}  // namespace

float widen(uint16_t bits) { return from_bits(uint32_t{bits} << 16); }

float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31, rest = half & 0x7fffu;
  // As bits of a float its exponent is 112 too low; the product also makes subnormals normal.
  const float magnitude = from_bits(rest << 13) * 0x1p112f;
  const uint32_t infinite = rest >= 0x7c00u ? 0x7f800000u : 0u;
  return from_bits(to_bits(magnitude) | infinite | sign);
}

uint16_t round(float value) {
  const uint32_t bits = to_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u)
    return static_cast<uint16_t>(bits >> 16 | 0x40u);  // NaN, made quiet
  return static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  decode_by(src, dst, dst_stride, [](const uint8_t* row, int j, ptrdiff_t) {
    return static_cast<float>(static_cast<int8_t>(row[j]));
  });
}

void from_e4m3(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  decode_by(src, dst, dst_stride, [](const uint8_t* row, int j, ptrdiff_t) { return kt::from_e4m3(row[j]); });
}

const DecodeKernels decode = {from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}};

}  // namespace kt::scalar
