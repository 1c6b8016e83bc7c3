#include "kernels/avx512_bf16/few_step.h"
#include "kernels/avx512_bf16/set.h"

namespace kt::avx512_bf16 {

void few_times_transposed(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride,
                          float* c, ptrdiff_t ldc, int accumulate) {
  kFewTimesTransposed<Step>[rows - 1](n, k, x, w, w_stride, c, ldc, accumulate);
}

void few_times(int rows, int n, int k, RowSource x, const uint16_t* w, ptrdiff_t w_stride, float* c,
               ptrdiff_t ldc, int accumulate) {
  kFewTimes<Step>[rows - 1](n, k, x, w, w_stride, c, ldc, accumulate);
}

}  // namespace kt::avx512_bf16
