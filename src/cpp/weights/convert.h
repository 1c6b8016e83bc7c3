// From what checkpoints store to the formats of base/weight.h: pure functions on memory, no files.
// None wants its bytes aligned beyond an element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "base/weight.h"

namespace kt {

// dst[j * dst_stride + i] = src[i * src_stride + j * src_step] for i < rows, j < cols; strides in elements.
void transpose(const std::uint16_t* src, index_t src_stride, index_t src_step, index_t rows, index_t cols,
               std::uint16_t* dst, index_t dst_stride);
void transpose(const std::uint32_t* src, index_t src_stride, index_t rows, index_t cols, std::uint32_t* dst,
               index_t dst_stride);

void f16_to_f32(std::span<const std::uint16_t> src, float* dst);
void bf16_to_f32(std::span<const bf16_t> src, float* dst);

// AWQ words [in, out / 8], a word the codes of 8 outputs in the order 0, 2, 4, 6, 1, 3, 5, 7, to int4 [out,
// in]; `in` is a multiple of 8.
void awq_codes(const std::uint32_t* words, index_t in, index_t out, std::byte* codes);

// How 8 zero points lie in a word.
struct ZeroOrder {
  int shift[8];  // of the i-th
  int less;      // what was subtracted from each
};
inline constexpr ZeroOrder kInOrder{{0, 4, 8, 12, 16, 20, 24, 28}, 0};
inline constexpr ZeroOrder kGptqOrder{{0, 4, 8, 12, 16, 20, 24, 28}, 1};
inline constexpr ZeroOrder kAwqOrder{{0, 16, 4, 20, 8, 24, 12, 28}, 0};

// Zero points of `out` outputs and `groups` groups, the word of outputs 8 q.. and group g at
// words[q * q_stride + g * g_stride], to a byte each, [out, groups].
void unpack_zeros(const std::uint32_t* words, index_t q_stride, index_t g_stride, index_t out, index_t groups,
                  const ZeroOrder& order, std::byte* zeros);

// A part of a matrix as kt-kernel writes it, rows a multiple of 32, cols of 64 (int8) or 128 (int4), to rows
// `stride` bytes apart.
void kt_int8_codes(const std::byte* part, index_t rows, index_t cols, std::byte* codes, index_t stride);
void kt_int4_codes(const std::byte* part, index_t rows, index_t cols, std::byte* codes, index_t stride);

// The place of the first scale that is NaN, infinite or 0; E8M0 and E4M3 are refused for NaN alone, of which
// a block of zeros may have the scale 0.
std::optional<index_t> bad_scale(ScaleType type, const std::byte* scales, index_t count);

}  // namespace kt
