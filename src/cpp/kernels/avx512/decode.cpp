#include "kernels/avx512/set.h"
#include "kernels/generic/groups.h"

namespace kt::avx512 {

namespace {

// The steps of decode_rows, each of one line.

struct Int8Step : Stored<Int8> {
  KT_INLINE explicit Int8Step(float scale) : Stored<Int8>{{_mm512_set1_ps(scale)}} {}
};

struct NibblesStep : Stored<Nibbles> {
  KT_INLINE NibblesStep(const float* values, float zero, float scale)
      : Stored<Nibbles>{{_mm512_sub_ps(_mm512_load_ps(values), _mm512_set1_ps(zero)), scale}} {}
};

struct HalfNibblesStep : Stored<HalfNibbles> {
  KT_INLINE HalfNibblesStep(const float* values, float first, float second)
      : Stored<HalfNibbles>{{upper_halves(rounded(values, first), rounded(values, second))}} {}
  KT_INLINE static __m512i rounded(const float* values, float scale) {
    return nearest_bf16(_mm512_mul_ps(_mm512_load_ps(values), _mm512_set1_ps(scale)));
  }
};

struct Fp8Step : Stored<Fp8> {
  KT_INLINE explicit Fp8Step(float scale) : Stored<Fp8>{Fp8(scale)} {}
};

}  // namespace

const DecodeKernels decode = Decodes<Vec, Int8Step, NibblesStep, HalfNibblesStep, Fp8Step>::kKernels;

}  // namespace kt::avx512
