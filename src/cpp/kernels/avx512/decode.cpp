#include "kernels/avx512/set.h"
#include "kernels/generic/groups.h"

namespace kt::avx512 {

namespace {

struct ScaledHalfNibbles : HalfNibbles {
  KT_INLINE ScaledHalfNibbles(const float* values, float first, float second)
      : HalfNibbles{upper_halves(rounded(values, first), rounded(values, second))} {}
  KT_INLINE static __m512i rounded(const float* values, float scale) {
    return nearest_bf16(_mm512_mul_ps(_mm512_load_ps(values), _mm512_set1_ps(scale)));
  }
};

}  // namespace

const DecodeKernels decode =
    Decodes<Vec, Stored<Int8>, Stored<Nibbles>, Stored<ScaledHalfNibbles>, Stored<Fp8>>::kKernels;

}  // namespace kt::avx512
