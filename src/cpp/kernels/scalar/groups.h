// The loops around a decode of codes, shared with the sets that decode fast. Static functions only: each
// set's objects keep their own copy.
#pragma once

#include <string.h>

#include "kernels/kernel_set.h"

namespace kt {

constexpr int kScalesTogether = 16;

static inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// The default quiet NaN for any, so that what is rounded by adding to its bits stays a NaN.
static inline float quiet(uint32_t bits) {
  return from_bits((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits);
}

static inline float from_e8m0(uint32_t exponent) {
  return from_bits(exponent << 23 | (exponent == 0 || exponent == 255) << 22);
}

// n scales from `place` on.
static inline void load_scales(const CodedRows& src, ptrdiff_t place, int n, float* scales) {
  switch (src.scale_kind) {
    case kScaleF32:
      for (int i = 0; i < n; ++i) scales[i] = quiet(static_cast<const uint32_t*>(src.scales)[place + i]);
      break;
    case kScaleBF16:
      for (int i = 0; i < n; ++i)
        scales[i] = quiet(uint32_t{static_cast<const uint16_t*>(src.scales)[place + i]} << 16);
      break;
    case kScaleE8M0:
      for (int i = 0; i < n; ++i) scales[i] = from_e8m0(static_cast<const uint8_t*>(src.scales)[place + i]);
      break;
  }
}

static inline float scale_at(const CodedRows& src, ptrdiff_t place) {
  float scale;
  load_scales(src, place, 1, &scale);
  return scale;
}

static inline float zero_at(const CodedRows& src, ptrdiff_t place) {
  return src.zeros ? static_cast<float>(src.zeros[place]) : 8.0f;
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

// Codes are decoded by so many columns.
constexpr int kStepCols = 32;

// Bytes that the codes of so many columns take.
template <int StepBytes>
static inline ptrdiff_t code_bytes(int cols) {
  return (ptrdiff_t{cols} * StepBytes + kStepCols - 1) / kStepCols;
}

// Bytes from a code to the prefetch that is made when it is decoded: in the row, or so many rows below where
// rows are short. Strips of a matrix are short rows far apart, which no hardware prefetcher follows.
static inline ptrdiff_t prefetch_distance(ptrdiff_t stride, ptrdiff_t row_bytes) {
  constexpr ptrdiff_t kAhead = 4096;
  return row_bytes >= kAhead ? kAhead : (kAhead + row_bytes - 1) / row_bytes * stride;
}

// The last columns of every row, fewer than a step takes: decoded aside, so that nothing is read or written
// behind them.
template <int StepBytes, class StepOf>
static void decode_edges(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride, const StepOf& step_of) {
  const int cols = src.cols % kStepCols, begin = src.cols - cols;
  for (int i = 0; i < src.rows; ++i) {
    const ptrdiff_t place = i * src.scale_stride + begin / src.group;
    uint8_t codes[StepBytes] = {};
    uint16_t decoded[kStepCols];
    memcpy(codes, src.codes + i * src.stride + code_bytes<StepBytes>(begin), code_bytes<StepBytes>(cols));
    step_of(scale_at(src, place), zero_at(src, place))(codes, decoded);
    memcpy(dst + i * dst_stride + begin, decoded, cols * sizeof *dst);
  }
}

// `Group` steps share a scale, 0: `group` of them.
template <int StepBytes, int Group, class StepOf>
static inline void decode_steps(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride, int group,
                                const StepOf& step_of) {
  const int steps = src.cols / kStepCols;
  const ptrdiff_t ahead = prefetch_distance(src.stride, code_bytes<StepBytes>(src.cols));
  const int groups = (steps + group - 1) / group;
  for (int i = 0; i < src.rows; ++i) {
    const uint8_t* codes = src.codes + i * src.stride;
    uint16_t* to = dst + i * dst_stride;
    int left = steps;
    for (int first = 0; first < groups; first += kScalesTogether) {
      const int n = groups - first < kScalesTogether ? groups - first : kScalesTogether;
      const ptrdiff_t place = i * src.scale_stride + first;
      float scales[kScalesTogether];
      load_scales(src, place, n, scales);
      for (int k = 0; k < n; ++k) {
        const auto decode = step_of(scales[k], zero_at(src, place + k));
        if (Group == 1) {
          __builtin_prefetch(codes + ahead);
          decode(codes, to);
          codes += StepBytes;
          to += kStepCols;
        } else {
          for (int step = left < group ? left : group; step > 0;
               --step, codes += StepBytes, to += kStepCols) {
            __builtin_prefetch(codes + ahead);
            decode(codes, to);
          }
          left -= group;
        }
      }
    }
  }
}

// step_of(scale, zero point) makes the step for columns that share them: step(codes, dst) decodes kStepCols
// columns from StepBytes bytes.
template <int StepBytes, class StepOf>
static inline void decode_rows(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride,
                               const StepOf& step_of) {
  const int group = src.group < src.cols ? src.group / kStepCols : (src.cols + kStepCols - 1) / kStepCols;
  if (group == 1)
    decode_steps<StepBytes, 1>(src, dst, dst_stride, 1, step_of);
  else
    decode_steps<StepBytes, 0>(src, dst, dst_stride, group, step_of);
  if (src.cols % kStepCols != 0) decode_edges<StepBytes>(src, dst, dst_stride, step_of);
}

}  // namespace kt
