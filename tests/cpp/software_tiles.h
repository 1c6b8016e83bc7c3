// What kernels/amx/tile_unit.h has, on arrays that behave like the CPU's tiles, so that the same micro-kernel
// is tested on CPUs without AMX.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

namespace kt::amx_software {

struct Tile {
  unsigned char row[16][64];
};

static thread_local Tile tiles[8];

static inline void load(Tile& tile, const void* base, ptrdiff_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(tile.row[i], static_cast<const char*>(base) + i * stride, 64);
}

static inline void store(const Tile& tile, void* base, ptrdiff_t stride) {
  for (int i = 0; i < 16; ++i) memcpy(static_cast<char*>(base) + i * stride, tile.row[i], 64);
}

static inline float bf16_at(const unsigned char* bytes) {
  uint32_t bits = 0;
  memcpy(reinterpret_cast<char*>(&bits) + 2, bytes, 2);
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

// c[i][j] += sum over pairs p of a[i][2p] b[p][2j] + a[i][2p + 1] b[p][2j + 1].
static inline void multiply(Tile& c, const Tile& a, const Tile& b) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) {
      float sum;
      memcpy(&sum, &c.row[i][4 * j], 4);
      for (int k = 0; k < 32; ++k)
        sum += bf16_at(&a.row[i][2 * k]) * bf16_at(&b.row[k / 2][4 * j + 2 * (k % 2)]);
      memcpy(&c.row[i][4 * j], &sum, 4);
    }
}

}  // namespace kt::amx_software

#define KT_AMX amx_software
#define KT_TILES_BEGIN() memset(tiles, 0xff, sizeof tiles)
#define KT_TILES_END() memset(tiles, 0xff, sizeof tiles)
#define KT_TILE_ZERO(t) memset(&tiles[t], 0, sizeof tiles[t])
#define KT_TILE_LOAD(t, base, stride) load(tiles[t], base, stride)
#define KT_TILE_STORE(t, base, stride) store(tiles[t], base, stride)
#define KT_TILE_MULTIPLY(c, a, b) multiply(tiles[c], tiles[a], tiles[b])
