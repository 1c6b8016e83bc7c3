#include "kernels/avx512/set.h"
#include "kernels/generic/groups.h"

namespace kt::avx512 {

namespace {

// The decoders of decode_rows, each of one line.

struct Int8Decoder : Stored<Int8> {
  KT_INLINE explicit Int8Decoder(float scale) : Stored<Int8>{{_mm512_set1_ps(scale)}} {}
};

struct NibblesDecoder : Stored<Nibbles> {
  KT_INLINE NibblesDecoder(const float* values, float zero, float scale)
      : Stored<Nibbles>{{_mm512_sub_ps(_mm512_load_ps(values), _mm512_set1_ps(zero)), scale}} {}
};

struct HalfNibblesDecoder : Stored<HalfNibbles> {
  KT_INLINE HalfNibblesDecoder(const float* values, float first, float second)
      : Stored<HalfNibbles>{{upper_halves(rounded(values, first), rounded(values, second))}} {}
  KT_INLINE static __m512i rounded(const float* values, float scale) {
    return nearest_bf16(_mm512_mul_ps(_mm512_load_ps(values), _mm512_set1_ps(scale)));
  }
};

struct Fp8Decoder : Stored<Fp8> {
  KT_INLINE explicit Fp8Decoder(float scale) : Stored<Fp8>{Fp8(scale)} {}
};

}  // namespace

const DecodeKernels decode =
    Decodes<Vec, Int8Decoder, NibblesDecoder, HalfNibblesDecoder, Fp8Decoder>::kKernels;

}  // namespace kt::avx512
