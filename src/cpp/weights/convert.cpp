#include "weights/convert.h"

#include <algorithm>
#include <cstring>

namespace kt {
namespace {

// Both sides of a block stay in the L1 cache, and what is written is whole lines.
constexpr index_t kBlock = 32;

template <class T>
void transpose_blocks(const T* src, index_t src_stride, index_t src_col_stride, index_t rows, index_t cols,
                      T* dst, index_t dst_stride) {
  for (index_t i0 = 0; i0 < rows; i0 += kBlock) {
    const index_t i1 = std::min(rows, i0 + kBlock);
    for (index_t j0 = 0; j0 < cols; j0 += kBlock) {
      const index_t j1 = std::min(cols, j0 + kBlock);
      for (index_t j = j0; j < j1; ++j) {
        for (index_t i = i0; i < i1; ++i) dst[j * dst_stride + i] = src[i * src_stride + j * src_col_stride];
      }
    }
  }
}

// Nibble n of word i and nibble i of word n change places.
void transpose_nibbles(std::uint32_t (&words)[8]) {
  const auto swap = [&](int distance, int shift, std::uint32_t low) {
    for (int i = 0; i < 8; ++i) {
      if (i & distance) continue;
      std::uint32_t &a = words[i], &b = words[i + distance];
      const std::uint32_t t = (a >> shift ^ b) & low;
      b ^= t;
      a ^= t << shift;
    }
  };
  swap(1, 4, 0x0f0f0f0fu);
  swap(2, 8, 0x00ff00ffu);
  swap(4, 16, 0x0000ffffu);
}

constexpr index_t kKtTileRows = 32, kKtTileBytes = 2048;
constexpr index_t kKtColumnBlock = 3584;

// Calls tile(bytes, row, column) in the order in which the tiles lie.
template <class Tile>
void for_kt_tiles(const std::byte* part, index_t rows, index_t cols, index_t row_block, index_t tile_cols,
                  Tile tile) {
  for (index_t r0 = 0; r0 < rows; r0 += row_block) {
    const index_t r1 = std::min(rows, r0 + row_block);
    for (index_t c0 = 0; c0 < cols; c0 += kKtColumnBlock) {
      const index_t c1 = std::min(cols, c0 + kKtColumnBlock);
      for (index_t r = r0; r < r1; r += kKtTileRows) {
        for (index_t c = c0; c < c1; c += tile_cols, part += kKtTileBytes) tile(part, r, c);
      }
    }
  }
}

// A row's 64 bytes lie in the tile as 16 times 4, those of 16 rows beside each other.
void kt_tile_row(const std::byte* tile, index_t row, std::byte* to) {
  const std::byte* from = tile + row / 16 * (kKtTileBytes / 2) + row % 16 * 4;
  for (int k = 0; k < 16; ++k) std::memcpy(to + 4 * k, from + 64 * k, 4);
}

// The lower nibbles of 8 bytes, side by side.
std::uint32_t gather_nibbles(std::uint64_t bytes) {
  bytes &= 0x0f0f0f0f0f0f0f0fu;
  bytes = (bytes | bytes >> 4) & 0x00ff00ff00ff00ffu;
  bytes = (bytes | bytes >> 8) & 0x0000ffff0000ffffu;
  return static_cast<std::uint32_t>(bytes | bytes >> 16);
}

}  // namespace

void transpose(const std::uint16_t* src, index_t src_stride, index_t src_col_stride, index_t rows,
               index_t cols, std::uint16_t* dst, index_t dst_stride) {
  transpose_blocks(src, src_stride, src_col_stride, rows, cols, dst, dst_stride);
}

void transpose(const std::uint32_t* src, index_t src_stride, index_t rows, index_t cols, std::uint32_t* dst,
               index_t dst_stride) {
  transpose_blocks(src, src_stride, index_t{1}, rows, cols, dst, dst_stride);
}

void awq_codes(const std::uint32_t* words, index_t in, index_t out, std::byte* codes) {
  static constexpr int kOutputOfNibble[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  constexpr index_t kInputsPerLine = 128;
  const index_t columns = out / 8, row_bytes = in / 2;
  for (index_t i0 = 0; i0 < in; i0 += kInputsPerLine) {
    const index_t i1 = std::min(in, i0 + kInputsPerLine);
    for (index_t q = 0; q < columns; ++q) {
      for (index_t i = i0; i < i1; i += 8) {
        std::uint32_t square[8];
        for (index_t k = 0; k < 8; ++k) square[k] = words[(i + k) * columns + q];
        transpose_nibbles(square);
        for (int n = 0; n < 8; ++n)
          std::memcpy(codes + (8 * q + kOutputOfNibble[n]) * row_bytes + i / 2, &square[n], sizeof square[n]);
      }
    }
  }
}

void unpack_zeros(const std::uint32_t* words, index_t q_stride, index_t g_stride, index_t out, index_t groups,
                  const ZeroOrder& order, std::byte* zeros) {
  for (index_t o = 0; o < out; ++o) {
    const std::uint32_t* from = words + o / 8 * q_stride;
    const int shift = order.shift[o % 8];
    for (index_t g = 0; g < groups; ++g) {
      const auto stored = from[g * g_stride] >> shift;
      zeros[o * groups + g] = static_cast<std::byte>((stored + static_cast<unsigned>(order.less)) & 15u);
    }
  }
}

void kt_int8_codes(const std::byte* part, index_t rows, index_t cols, std::byte* codes, index_t stride) {
  for_kt_tiles(part, rows, cols, 64, 64, [&](const std::byte* tile, index_t row, index_t col) {
    for (index_t i = 0; i < kKtTileRows; ++i) kt_tile_row(tile, i, codes + (row + i) * stride + col);
  });
}

void kt_int4_codes(const std::byte* part, index_t rows, index_t cols, std::byte* codes, index_t stride) {
  constexpr std::uint32_t kBiased = 0x88888888u;  // two's complement to an offset of 8
  for_kt_tiles(part, rows, cols, 128, 128, [&](const std::byte* tile, index_t row, index_t col) {
    for (index_t i = 0; i < kKtTileRows; ++i) {
      std::uint64_t bytes[8];
      kt_tile_row(tile, i, reinterpret_cast<std::byte*>(bytes));
      std::byte* to = codes + (row + i) * stride + col / 2;
      for (int k = 0; k < 8; ++k) {
        const std::uint32_t low = gather_nibbles(bytes[k]) ^ kBiased;
        const std::uint32_t high = gather_nibbles(bytes[k] >> 4) ^ kBiased;
        std::memcpy(to + 4 * k, &low, sizeof low);
        std::memcpy(to + 32 + 4 * k, &high, sizeof high);
      }
    }
  });
}

}  // namespace kt
