// From what checkpoints store to the formats of base/weight.h, and to these from weights in full precision:
// codes and scales chosen for a small squared error (quantize.cpp). Pure functions on memory, without files
// or threads, with the same bits from every kernel set. Stored bytes need no alignment beyond an element.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "base/view.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"

namespace kt {

// dst[j * dst_stride + i] = src[i * src_stride + j * src_col_stride] for i < rows, j < cols; strides in
// elements.
void transpose(const std::uint16_t* src, index_t src_stride, index_t src_col_stride, index_t rows,
               index_t cols, std::uint16_t* dst, index_t dst_stride);
void transpose(const std::uint32_t* src, index_t src_stride, index_t rows, index_t cols, std::uint32_t* dst,
               index_t dst_stride);

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
