// Kernels that only the comparison of weight layouts needs, in a file of its own because of its -m flags.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace kt::layouts {

// One block of 32 x 32 weights, from a panel of one direction to one of the other: [16][32][2] both.
void turn_block(const uint16_t* from, uint16_t* to);

// k rows of `cols` weights in natural order, k a multiple of 8, as panels [k / 2][32][2].
void pack_strip(const uint16_t* w, ptrdiff_t w_stride, int k, int cols, char* panels, ptrdiff_t panel_bytes);

// Memory to prefetch: with every 32 of k, `lines` cache lines `line` bytes apart; `run` bytes to the next 32.
struct Ahead {
  const char* first = nullptr;
  ptrdiff_t run = 0, line = 0;
  int lines = 0;
};

// Kernels on weights in natural order, which read tokens from panels of the set they are named after.
// Forward: c[rows x cols] (+)= w[rows x k] * panels' columns, cols <= 64 in panels `panel_bytes` apart.
// Backward: c[rows x 32] (+)= A panel * w[k x 32], k a multiple of 32.
struct Direct {
  // The set's micro-kernel for one pair of panels, prefetching; C has all rows of its tiles.
  void (*multiply)(int rows, int cols, int k, const char* a, const char* b, float* c, ptrdiff_t ldc,
                   const Ahead& ahead);
  int rows;  // of w that one call of forward takes at most
  void (*forward)(int rows, int cols, int k, const uint16_t* w, ptrdiff_t w_stride, const char* b,
                  ptrdiff_t panel_bytes, float* c, ptrdiff_t ldc);
  // Few tokens: c[rows x 8] from an A panel of at most 8; null where forward serves.
  void (*forward_few)(int rows, int k, const uint16_t* w, ptrdiff_t w_stride, const char* a, float* c,
                      ptrdiff_t ldc);
  void (*backward_few)(int rows, int k, const char* a, const uint16_t* w, ptrdiff_t w_stride, float* c,
                       ptrdiff_t ldc);  // null where there is none
  void (*begin)();
  void (*end)();
};

extern const Direct direct_avx512_bf16, direct_amx;

}  // namespace kt::layouts
