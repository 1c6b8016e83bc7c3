// The AMX tile unit: the few operations the micro-kernel needs, on the CPU's tiles or, with
// KT_SOFTWARE_TILES, on arrays that behave like them, so that the same micro-kernel is tested on CPUs without
// AMX. A tile is 16 rows of 64 bytes. Macros, because gcc 12 wants tile numbers as literals.
#pragma once

#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#ifdef KT_SOFTWARE_TILES

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

#else

namespace kt::amx {

// Palette 1: eight tiles, here all of 16 rows and 64 bytes (Intel SDM, LDTILECFG).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static constexpr TileConfig kTileConfig;

}  // namespace kt::amx

#define KT_AMX amx
#define KT_TILES_BEGIN() _tile_loadconfig(&kTileConfig)
#define KT_TILES_END() _tile_release()
#define KT_TILE_ZERO(t) _tile_zero(t)
#define KT_TILE_LOAD(t, base, stride) _tile_loadd(t, base, stride)
#define KT_TILE_STORE(t, base, stride) _tile_stored(t, base, stride)
#define KT_TILE_MULTIPLY(c, a, b) _tile_dpbf16ps(c, a, b)

#endif
