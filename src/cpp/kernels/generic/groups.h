// The loops around a decode of codes, and the decodes of sets with vectors over their own decoders and their
// own Vec (generic/epilogue.h says what that has). Static functions only: each set's objects keep their own
// copy.
#pragma once

#include <string.h>

#include "kernels/kernel_set.h"
#include "kernels/scalar/set.h"

namespace kt {

constexpr int kScalesTogether = 16;

// What the nibbles of int4, before the zero point, and of E2M1 stand for.
alignas(64) constexpr float kCounts[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
alignas(64) constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                         -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

static inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// The default quiet NaN for any, so that what is rounded by adding to its bits stays a NaN.
static inline float quiet(uint32_t bits) {
  return from_bits((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc00000 : bits);
}

static inline float from_e8m0(uint32_t exponent) {
  return from_bits(exponent << 23 | (exponent == 0 || exponent == 255) << 22);
}

static inline float from_e4m3(uint32_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  const float normal = from_bits((exponent + 120) << 23 | mantissa << 20);
  const float magnitude = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9f : normal;
  const float value = code & 0x80 ? -magnitude : magnitude;
  return (code & 0x7f) == 0x7f ? from_bits(0x7fc00000u) : value;
}

template <class T>
static inline T element(const void* array, ptrdiff_t i) {  // at any address
  T value;
  memcpy(&value, static_cast<const char*>(array) + i * static_cast<ptrdiff_t>(sizeof value), sizeof value);
  return value;
}

// n scales from `place` on.
static inline void load_scales(const CodedRows& src, ptrdiff_t place, int n, float* scales) {
  switch (src.scale_type) {
    case ScaleType::f32:
      for (int i = 0; i < n; ++i) scales[i] = quiet(element<uint32_t>(src.scales, place + i));
      break;
    case ScaleType::bf16:
      for (int i = 0; i < n; ++i) scales[i] = quiet(uint32_t{element<uint16_t>(src.scales, place + i)} << 16);
      break;
    case ScaleType::e8m0:
      for (int i = 0; i < n; ++i) scales[i] = from_e8m0(element<uint8_t>(src.scales, place + i));
      break;
    case ScaleType::e4m3:
      for (int i = 0; i < n; ++i) scales[i] = from_e4m3(element<uint8_t>(src.scales, place + i));
      if (src.divides)
        for (int i = 0; i < n; ++i) scales[i] /= src.global_scale;
      else
        for (int i = 0; i < n; ++i) scales[i] *= src.global_scale;
      break;
    case ScaleType::none: break;
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

// Calls body(place, n) until it has seen every scale, n <= most of them at a time.
template <class Body>
KT_INLINE static void for_scales(const CodedRows& src, int most, const Body& body) {
  const int groups = (src.cols - 1) / src.group + 1;
  const bool dense = src.scale_stride == groups;
  const int runs = dense || src.scale_stride == 0 ? 1 : src.rows, run = dense ? src.rows * groups : groups;
  for (int i = 0; i < runs; ++i)
    for (int first = 0; first < run; first += most)
      body(i * src.scale_stride + first, run - first < most ? run - first : most);
}

// Whether no product of an int8 or fp8 code other than 0 is denormal or overflows.
static inline bool products_are_normal(const CodedRows& src) {
  int outside = 0;
  for_scales(src, kScalesTogether, [&](ptrdiff_t place, int n) KT_INLINE_LAMBDA {
    float scales[kScalesTogether];
    load_scales(src, place, n, scales);
    for (int k = 0; k < n; ++k) {
      const float magnitude = __builtin_fabsf(scales[k]);
      outside |= !(magnitude >= 0x1p-100f) | !(magnitude <= 0x1p100f);
    }
  });
  return outside == 0;
}

// A decoder takes a line of so many columns, which are 64 bytes of bf16.
constexpr int kDecoderCols = 32;

// Bytes that the codes of so many columns take.
template <int Bytes>
static inline ptrdiff_t code_bytes(int cols) {
  return (ptrdiff_t{cols} * Bytes + kDecoderCols - 1) / kDecoderCols;
}

// Bytes from a code to the prefetch that is made when it is decoded: in the row, or so many rows below where
// rows are short. Strips of a matrix are short rows far apart, which no hardware prefetcher follows.
static inline ptrdiff_t prefetch_distance(ptrdiff_t stride, ptrdiff_t row_bytes) {
  constexpr ptrdiff_t kAhead = 4096;
  return row_bytes >= kAhead ? kAhead : (kAhead + row_bytes - 1) / row_bytes * stride;
}

// The last columns of every row, fewer than a decoder takes: decoded aside, so that nothing is read or
// written behind them. decoder_at(place of their first scale) decodes them.
template <int Bytes, class DecoderAt>
static void decode_edges(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride,
                         const DecoderAt& decoder_at) {
  const int cols = src.cols % kDecoderCols, begin = src.cols - cols;
  for (int i = 0; i < src.rows; ++i) {
    const ptrdiff_t place = i * src.scale_stride + begin / src.group;
    uint8_t codes[Bytes] = {};
    uint16_t decoded[kDecoderCols];
    memcpy(codes, src.codes + i * src.stride + code_bytes<Bytes>(begin), code_bytes<Bytes>(cols));
    decoder_at(place)(codes, decoded);
    memcpy(dst + i * dst_stride + begin, decoded, cols * sizeof *dst);
  }
}

template <int Bytes, class Decoder>
KT_INLINE static void decode_lines(const Decoder& decoder, int lines, ptrdiff_t ahead, const uint8_t*& codes,
                                   uint16_t*& dst) {
  for (; lines > 0; --lines, codes += Bytes, dst += kDecoderCols) {
    __builtin_prefetch(codes + ahead);
    decoder(codes, dst);
  }
}

// The columns of one group, from `begin` on, in all rows: where rows share scales, a decoder serves them all.
template <int Bytes, class DecoderOf>
static inline void decode_group(const CodedRows& src, int begin, ptrdiff_t ahead, uint16_t* dst,
                                ptrdiff_t dst_stride, const DecoderOf& decoder_of) {
  const int cols = src.cols - begin < src.group ? src.cols - begin : src.group;
  const ptrdiff_t first = begin / src.group;
  auto decoder = decoder_of(scale_at(src, first), zero_at(src, first));
  for (int i = 0; i < src.rows; ++i) {
    const ptrdiff_t place = i * src.scale_stride + first;
    if (place != first) decoder = decoder_of(scale_at(src, place), zero_at(src, place));
    const uint8_t* codes = src.codes + i * src.stride + code_bytes<Bytes>(begin);
    uint16_t* to = dst + i * dst_stride + begin;
    decode_lines<Bytes>(decoder, cols / kDecoderCols, ahead, codes, to);
  }
}

// Row by row. Groups of GroupLines lines share a scale; 0: of as many as src.group says.
template <int Bytes, int GroupLines, class DecoderOf>
static inline void decode_groups(const CodedRows& src, ptrdiff_t ahead, uint16_t* dst, ptrdiff_t dst_stride,
                                 const DecoderOf& decoder_of) {
  const int group = GroupLines == 0 ? src.group / kDecoderCols : GroupLines;
  const int lines = src.cols / kDecoderCols, groups = (lines + group - 1) / group;
  for (int i = 0; i < src.rows; ++i) {
    const uint8_t* codes = src.codes + i * src.stride;
    uint16_t* to = dst + i * dst_stride;
    int left = lines;
    for (int first = 0; first < groups; first += kScalesTogether) {
      const int n = groups - first < kScalesTogether ? groups - first : kScalesTogether;
      const ptrdiff_t place = i * src.scale_stride + first;
      float scales[kScalesTogether];
      load_scales(src, place, n, scales);
      for (int k = 0; k < n; ++k, left -= group)
        decode_lines<Bytes>(decoder_of(scales[k], zero_at(src, place + k)),
                            GroupLines == 1 || left > group ? group : left, ahead, codes, to);
    }
  }
}

// decoder_of(scale, zero point) makes the decoder for columns that share them: decoder(codes, dst) decodes
// kDecoderCols columns from Bytes bytes.
template <int Bytes, class DecoderOf>
static inline void decode_rows(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride,
                               const DecoderOf& decoder_of) {
  constexpr int kManyRows = 32;  // fewer are read as they lie in memory, which hides more of its latency
  const ptrdiff_t ahead = prefetch_distance(src.stride, code_bytes<Bytes>(src.cols));
  if (src.group >= src.cols || (src.scale_stride == 0 && src.rows >= kManyRows))
    for (int begin = 0; begin < src.cols; begin += src.group)
      decode_group<Bytes>(src, begin, ahead, dst, dst_stride, decoder_of);
  else if (src.group == kDecoderCols)
    decode_groups<Bytes, 1>(src, ahead, dst, dst_stride, decoder_of);
  else
    decode_groups<Bytes, 0>(src, ahead, dst, dst_stride, decoder_of);
  if (src.cols % kDecoderCols == 0) return;
  decode_edges<Bytes>(src, dst, dst_stride,
                      [&](ptrdiff_t place) { return decoder_of(scale_at(src, place), zero_at(src, place)); });
}

constexpr int kHalfCols = kDecoderCols / 2;

// Whether a decoder has columns of two groups: decode_half_groups decodes these.
static inline bool has_half_groups(const CodedRows& src) {
  return src.group == kHalfCols && src.cols > kHalfCols;
}

// decoder_of(scale of the first half of the columns, of the second one) makes a decoder.
template <int Bytes, class DecoderOf>
static inline void decode_half_groups(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride,
                                      const DecoderOf& decoder_of) {
  constexpr int kTogether = kScalesTogether / 2;
  const ptrdiff_t ahead = prefetch_distance(src.stride, code_bytes<Bytes>(src.cols));
  const int lines = src.cols / kDecoderCols, edge = src.cols % kDecoderCols;
  for (int i = 0; i < src.rows; ++i) {
    const uint8_t* codes = src.codes + i * src.stride;
    uint16_t* to = dst + i * dst_stride;
    for (int first = 0; first < lines; first += kTogether) {
      const int n = lines - first < kTogether ? lines - first : kTogether;
      float scales[kScalesTogether];
      load_scales(src, i * src.scale_stride + 2 * first, 2 * n, scales);
      for (int k = 0; k < n; ++k)
        decode_lines<Bytes>(decoder_of(scales[2 * k], scales[2 * k + 1]), 1, ahead, codes, to);
    }
  }
  if (edge == 0) return;
  decode_edges<Bytes>(src, dst, dst_stride, [&](ptrdiff_t place) {
    return decoder_of(scale_at(src, place), scale_at(src, edge > kHalfCols ? place + 1 : place));
  });
}

namespace {

// Elements of a row to bf16: load(place, part) loads a Vec of them.
template <class Vec, class T, class Load>
inline void round_row(int n, const T* src, uint16_t* dst, const Load& load) {
  // Elements between a prefetch and its use: memory then gives up to three times as much.
  constexpr int kAhead = 512;
  int i = 0;
  for (; i + Vec::kSize <= n; i += Vec::kSize) {
    __builtin_prefetch(src + i + kAhead);
    load(src + i, Vec::kAll).store_bf16(dst + i);
  }
  if (i < n) load(src + i, Vec::first(n - i)).store_bf16(dst + i, Vec::first(n - i));
}

// A decoder of 32 columns is made from their scale, that of nibbles also from what the sixteen codes stand
// for and from the zero point, and HalfNibbles from the scales of either half.
template <class Vec, class Int8, class Nibbles, class HalfNibbles, class Fp8>
struct Decodes {
  static void from_f32(int n, const float* src, uint16_t* dst) {
    round_row<Vec>(n, src, dst, [](const float* x, typename Vec::Part part) { return Vec::load(x, part); });
  }
  static void from_f16(int n, const uint16_t* src, uint16_t* dst) {
    round_row<Vec>(n, src, dst, Vec::load_f16);
  }

  static void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
    decode_rows<32>(src, dst, dst_stride, [](float scale, float) { return Int8(scale); });
  }

  static void from_int4(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
    decode_rows<16>(src, dst, dst_stride,
                    [](float scale, float zero) { return Nibbles(kCounts, zero, scale); });
  }

  static void from_e2m1(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
    if (has_half_groups(src))
      return decode_half_groups<16>(
          src, dst, dst_stride, [](float first, float second) { return HalfNibbles(kE2M1, first, second); });
    decode_rows<16>(src, dst, dst_stride, [](float scale, float) { return Nibbles(kE2M1, 0.0f, scale); });
  }

  static void from_e4m3(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
    if (!products_are_normal(src)) return scalar::from_e4m3(src, dst, dst_stride);
    decode_rows<32>(src, dst, dst_stride, [](float scale, float) { return Fp8(scale); });
  }

  static constexpr DecodeKernels kKernels = {
      from_f32, from_f16, {nullptr, from_int8, from_int4, from_e4m3, from_e2m1}};
};

}  // namespace

}  // namespace kt
