// The AMX tile unit: the few operations the micro-kernel needs. A tile is 16 rows of 64 bytes. Macros,
// because gcc 12 wants tile numbers as literals. A test has the same on arrays, for CPUs without AMX.
#pragma once

#include <immintrin.h>
#include <stdint.h>

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
