#include "gemm/gemm.h"

#include <doctest/doctest.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "kernel_sets.h"

using namespace kt;

namespace {

// Small whole numbers: exact in bf16, and so are their products and sums in fp32.
float whole_number(index_t i) { return static_cast<float>(i * 7 % 11 - 5); }

template <class T>
std::vector<T> whole_numbers(index_t n, T (*from)(float)) {
  std::vector<T> values;
  for (index_t i = 0; i < n; ++i) values.push_back(from(whole_number(i)));
  return values;
}

bf16_t rounded(float x) { return to_bf16(x); }
float same(float x) { return x; }

struct Sizes {
  index_t rows, cols, k;
};

// c = a w' through pack_a, for rows from the second panel on; a in order or picked by an index.
template <class T>
void check_product(const KernelSet& kernels, const Sizes& size, DType dtype, const std::vector<T>& a,
                   bool picked) {
  Arena scratch;
  const std::vector<bf16_t> w = whole_numbers(size.cols * size.k, rounded);
  std::vector<std::int32_t> index;
  for (index_t i = 0; picked && i < size.rows; ++i)
    index.push_back(static_cast<std::int32_t>(i * 5 % size.rows));
  const Rows source{view(a.data(), dtype, size.rows, size.k), picked ? index.data() : nullptr};
  const PackedA all = pack_a(kernels, source, scratch);
  const bool lies = kernels.gemm.in_place && !picked && size.k % 2 == 0;
  CHECK((all.row_bytes != 0) == lies);
  if (dtype == DType::bf16) CHECK((all.data == static_cast<const void*>(a.data())) == lies);

  const index_t first = kernels.gemm.mr, stride = min_ldc(kernels, size.cols);
  const Term term{rows_of(kernels, all, {first, size.rows}),
                  pack_b_cols(kernels, {view(w.data(), DType::bf16, size.cols, size.k)}, scratch)};
  std::vector<float> c(static_cast<std::size_t>((size.rows - first) * stride));
  brgemm(kernels, {&term, 1}, c.data(), stride);
  for (index_t i = first; i < size.rows; ++i)
    for (index_t j = 0; j < size.cols; ++j) {
      const index_t row = picked ? index[static_cast<std::size_t>(i)] : i;
      float sum = 0;
      for (index_t p = 0; p < size.k; ++p)
        sum += whole_number(row * size.k + p) * whole_number(j * size.k + p);
      CHECK(c[static_cast<std::size_t>((i - first) * stride + j)] == sum);
    }
}

}  // namespace

TEST_CASE(
    "a left operand: packed, or where it lies, from bf16 or fp32, in order or picked, some of its rows") {
  for_every_available_set([](KernelSet kernels) {
    for (const bool in_place : {kernels.gemm.in_place, false}) {
      kernels.gemm.in_place = in_place;
      for (const index_t k : {2, 31, 64})
        for (const bool picked : {false, true}) {
          const Sizes size{3 * kernels.gemm.mr - 1, kernels.gemm.nr + 3, k};
          check_product(kernels, size, DType::bf16, whole_numbers(size.rows * k, rounded), picked);
          if (!picked) check_product(kernels, size, DType::f32, whole_numbers(size.rows * k, same), picked);
        }
    }
  });
}
