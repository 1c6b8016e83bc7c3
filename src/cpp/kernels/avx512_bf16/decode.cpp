#include "kernels/avx512/set.h"
#include "kernels/avx512_bf16/lines.h"
#include "kernels/avx512_bf16/set.h"
#include "kernels/scalar/groups.h"

namespace kt::avx512_bf16 {

// VCVTNE2PS2BF16 rounds as wanted where no product is denormal.
void from_int8(const CodedRows& src, uint16_t* dst, ptrdiff_t dst_stride) {
  if (!products_are_normal(src)) return avx512::from_int8(src, dst, dst_stride);
  decode_rows<32>(src, dst, dst_stride,
                  [](float scale, float) { return Stored<Int8>{{_mm512_set1_ps(scale)}}; });
}

}  // namespace kt::avx512_bf16
