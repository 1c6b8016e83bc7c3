// The loops around a decode of codes, shared with the sets that decode fast. Static functions only: each
// set's objects keep their own copy.
#pragma once

#include <string.h>

#include "kernels/kernel_set.h"

namespace kt {

static inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// A NaN is the default quiet one, so that what is rounded by adding to its bits stays a NaN.
static inline float scale_at(const CodedRows& src, ptrdiff_t place) {
  uint32_t bits;
  switch (src.scale_kind) {
    case kScaleF32: bits = static_cast<const uint32_t*>(src.scales)[place]; break;
    case kScaleBF16: bits = uint32_t{static_cast<const uint16_t*>(src.scales)[place]} << 16; break;
    case kScaleE8M0: {
      const uint32_t exponent = static_cast<const uint8_t*>(src.scales)[place];
      bits = exponent == 0 ? 0x00400000 : exponent << 23;
      if (exponent == 255) bits = 0x7fc00000;
      break;
    }
  }
  return from_bits((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits);
}

// Whether no product of an int8 or fp8 code other than 0 is denormal or overflows.
static inline bool products_are_normal(const CodedRows& src) {
  for (int i = 0; i < (src.scale_stride == 0 ? 1 : src.rows); ++i)
    for (int j = 0; j < (src.cols - 1) / src.group + 1; ++j) {
      const float magnitude = __builtin_fabsf(scale_at(src, i * src.scale_stride + j));
      if (!(magnitude >= 0x1p-100f && magnitude <= 0x1p100f)) return false;
    }
  return true;
}

// Codes are decoded by so many columns. The last ones of a row may be fewer: they are decoded aside, so that
// nothing is read or written behind them.
constexpr int kStepCols = 32;

// Bytes from a code to the prefetch that is made when it is decoded: in the row, or so many rows below where
// rows are short. Strips of a matrix are short rows far apart, which no hardware prefetcher follows.
static inline ptrdiff_t prefetch_distance(ptrdiff_t stride, ptrdiff_t row_bytes) {
  constexpr ptrdiff_t kAhead = 1024;
  return row_bytes >= kAhead ? kAhead : (kAhead + row_bytes - 1) / row_bytes * stride;
}

// step(codes, dst) decodes kStepCols columns from StepBytes bytes.
template <int StepBytes, class Step>
__attribute__((always_inline)) static inline void decode_group(const uint8_t* codes, int cols,
                                                               ptrdiff_t ahead, uint16_t* dst,
                                                               const Step& step) {
  for (; cols >= kStepCols; cols -= kStepCols, codes += StepBytes, dst += kStepCols) {
    __builtin_prefetch(codes + ahead);
    step(codes, dst);
  }
  if (cols == 0) return;
  uint8_t codes_aside[StepBytes] = {};
  uint16_t dst_aside[kStepCols];
  memcpy(codes_aside, codes, (cols * StepBytes + kStepCols - 1) / kStepCols);
  step(codes_aside, dst_aside);
  memcpy(dst, dst_aside, cols * sizeof *dst);
}

// step_of(scale, zero point) makes the step for columns that share them.
template <int StepBytes, class StepOf>
__attribute__((always_inline)) static inline void decode_rows(const CodedRows& src, uint16_t* dst,
                                                              ptrdiff_t dst_stride, const StepOf& step_of) {
  const ptrdiff_t row_bytes = (ptrdiff_t{src.cols} * StepBytes + kStepCols - 1) / kStepCols;
  const ptrdiff_t ahead = prefetch_distance(src.stride, row_bytes);
  for (int i = 0; i < src.rows; ++i, dst += dst_stride) {
    const uint8_t* codes = src.codes + i * src.stride;
    ptrdiff_t place = i * src.scale_stride;
    for (int j = 0, cols; j < src.cols; j += cols, ++place) {
      cols = src.cols - j < src.group ? src.cols - j : src.group;
      decode_group<StepBytes>(codes + ptrdiff_t{j} * StepBytes / kStepCols, cols, ahead, dst + j,
                              step_of(scale_at(src, place), src.zeros ? src.zeros[place] : 8));
    }
  }
}

}  // namespace kt
