// Products, on fp32.
#include "kernels/avx512/product.h"
#include "kernels/avx512/set.h"

namespace kt::avx512 {

namespace {

struct TileTraits : F32Tile<Vec>, TileTuning {};

struct GemvTraits : F32Gemv<Vec>, GemvTuning {
  static constexpr int kUnaided = 1;
};

constexpr GemvKernels gemv = {gemv_nt<GemvTraits>, gemv_nn<GemvTraits>};

}  // namespace

extern const OwnKernels kernels;
const OwnKernels kernels = {
    .gemm = &kF32Gemm<TileTraits>, .gemv = &gemv, .epilogue = &epilogue, .decode = &decode};

}  // namespace kt::avx512
