// The multiply-add of an AVX-512 set on registers alone; `Step` as in tile.h, with the depth of its product.
#pragma once

#include "kernels/avx512/registers.h"

namespace kt {

template <class Step>
static double multiply_registers(int rounds, void* registers) {
  constexpr int kChains = 16;  // two units, each with a latency of at most 8 multiply-adds
  char* words = static_cast<char*>(registers);
  const typename Step::Operand a = Step::load(words), b = Step::load(words + 64);
  __m512 acc[kChains];
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) acc[i] = _mm512_load_ps(words + 64 * i);
  for (int round = 0; round < rounds; ++round)
#pragma GCC unroll 16
    for (int i = 0; i < kChains; ++i) acc[i] = Step::multiply_add(a, b, acc[i]);
#pragma GCC unroll 16
  for (int i = 0; i < kChains; ++i) _mm512_store_ps(words + 64 * i, acc[i]);
  return 2.0 * Step::kDepth * 16 * kChains * rounds;
}

}  // namespace kt
