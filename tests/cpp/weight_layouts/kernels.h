// Kernels that only the comparison of weight layouts needs, in a file of its own because of its -m flags.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt::layouts {

// One block of 32 x 32 weights, from a panel of one direction to one of the other: [16][32][2] both.
void turn_block(const uint16_t* from, uint16_t* to);

// Forward on weights in natural order: c[rows x cols] = w[rows x k] * columns of B panels, `panel_bytes`
// apart. rows <= most_rows, cols <= 64; c has whole tiles.
struct Direct {
  int most_rows;
  void (*forward)(int rows, int cols, int k, const uint16_t* w, ptrdiff_t w_stride, const char* b,
                  ptrdiff_t panel_bytes, float* c, ptrdiff_t ldc);
  void (*begin)();
  void (*end)();
};

extern const Direct direct_avx512_bf16, direct_amx;

}  // namespace kt::layouts
