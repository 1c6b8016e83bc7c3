// GEMVs with codes: the bits of decode, then multiply.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "end_of_page.h"
#include "gemm/gemm.h"
#include "kernel_sets.h"
#include "weights/grids.h"

using namespace kt;

namespace {

std::mt19937& random() {
  static std::mt19937 generator(1);
  return generator;
}

// A weight with random codes and ordinary scales, its parts ending with their pages.
struct Coded {
  Coded(const WeightType& type, index_t rows, index_t cols)
      : weight{type, rows, cols},
        codes(static_cast<int>(weight.codes_bytes())),
        scales(static_cast<int>(weight.scales_bytes())),
        zeros(static_cast<int>(std::max(weight.zeros_bytes(), index_t{1}))),
        global_scale(static_cast<int>(sizeof(float))) {
    for (index_t i = 0; i < weight.codes_bytes(); ++i) codes.data[i] = static_cast<std::byte>(random()());
    for (index_t i = 0; i < weight.zeros_bytes(); ++i)
      zeros.data[i] = static_cast<std::byte>(random()() % 16);
    for (index_t i = 0; i < weight.scale_count(); ++i)
      set_scale(i, 0.01f * static_cast<float>(1 + random()() % 50));
    weight.codes = codes.data;
    weight.scales = scales.data;
    weight.zeros = type.zero_points ? zeros.data : nullptr;
    weight.global_scale = type.global_scale == GlobalScale::none ? nullptr : global_scale.data;
    set_global_scale(0.037f);
  }

  void set_global_scale(float x) { std::memcpy(global_scale.data, &x, sizeof x); }

  void set_scale(index_t i, float x) {
    std::byte* to = scales.data + i * size_of(weight.type.scale);
    const bf16_t rounded = to_bf16(x);
    const auto exponent = static_cast<std::uint8_t>(rounded >> 7);
    switch (weight.type.scale) {
      case ScaleType::f32: std::memcpy(to, &x, sizeof x); break;
      case ScaleType::bf16: std::memcpy(to, &rounded, sizeof rounded); break;
      case ScaleType::e8m0: std::memcpy(to, &exponent, sizeof exponent); break;
      case ScaleType::e4m3: *to = static_cast<std::byte>(grids::E4M3::code(100 * x)); break;
      case ScaleType::none: break;
    }
  }

  Weight weight;
  EndOfPage<std::byte> codes, scales, zeros, global_scale;
};

std::vector<bf16_t> random_bf16(index_t n) {
  std::normal_distribution<float> normal;
  std::vector<bf16_t> values(static_cast<std::size_t>(n));
  for (bf16_t& x : values) x = to_bf16(normal(random()));
  return values;
}

enum class Direction { nt, nn };
constexpr Direction kDirections[] = {Direction::nt, Direction::nn};

// The set without products of codes: it decodes.
KernelSet decoding(KernelSet set) {
  set.gemv.coded = nullptr;
  return set;
}

std::vector<float> product(const KernelSet& set, Direction direction, Rows x, const WeightBlock& w,
                           bool accumulate) {
  constexpr index_t kMargin = 3;
  Arena scratch;
  const index_t n = direction == Direction::nn ? w.cols.size() : w.rows.size(), stride = n + kMargin;
  std::vector<float> c(static_cast<std::size_t>(x.matrix.rows * stride), 0.5f);
  if (direction == Direction::nn)
    gemv_nn(set, x, w, c.data(), stride, accumulate, scratch);
  else
    gemv_nt(set, x, w, c.data(), stride, accumulate, scratch);
  return c;
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

void check_block(Direction direction, index_t rows, const WeightBlock& w) {
  CAPTURE(direction == Direction::nn);
  CAPTURE(name_of(w.weight->type.format));
  CAPTURE(name_of(w.weight->type.scale));
  CAPTURE(w.weight->group());
  CAPTURE(w.weight->type.zero_points);
  CAPTURE(rows);
  CAPTURE(w.rows.begin);
  CAPTURE(w.rows.end);
  CAPTURE(w.cols.begin);
  CAPTURE(w.cols.end);
  const index_t k = direction == Direction::nn ? w.rows.size() : w.cols.size();
  const std::vector<bf16_t> x = random_bf16(2 * rows * k);
  std::vector<std::int32_t> index;
  for (index_t i = 0; i < rows; ++i) index.push_back(static_cast<std::int32_t>(2 * rows - 1 - i));
  for_every_available_set([&](const KernelSet& set) {
    for (const bool accumulate : {false, true}) {
      const Rows of{view(x.data(), DType::bf16, rows, k), accumulate ? index.data() : nullptr};
      const std::vector<float> found = product(set, direction, of, w, accumulate);
      const std::vector<float> wanted = product(decoding(set), direction, of, w, accumulate);
      CHECK(same_bits(found, wanted));
    }
  });
}

// The types of weights that files and quantisation have, and some that they might.
std::vector<WeightType> types(index_t group) {
  std::vector<WeightType> all;
  for (const ScaleType scale : {ScaleType::f32, ScaleType::bf16}) {
    all.push_back({Format::int8, scale, 1, group});
    all.push_back({Format::fp8, scale, 1, group});
    all.push_back({Format::fp8, scale, 128, group});
    for (const bool zeros : {false, true}) all.push_back({Format::int4, scale, 1, group, zeros});
  }
  all.push_back({Format::mxfp4, ScaleType::e8m0, 1, group});
  all.push_back({Format::mxfp4, ScaleType::bf16, 1, group});
  all.push_back({Format::int8, ScaleType::e8m0, 1, group});
  for (const GlobalScale global_scale : {GlobalScale::multiplies, GlobalScale::divides})
    all.push_back({Format::nvfp4, ScaleType::e4m3, 1, 16, false, global_scale});
  return all;
}

}  // namespace

TEST_CASE("every format, group, direction and number of rows, with and without tails") {
  for (const index_t group : {32, 64, 128, 0})
    for (const WeightType& type : types(group))
      for (const auto& [n, k] : {std::pair<index_t, index_t>{70, 384}, {34, 160}, {33, 96}, {7, 50}}) {
        const Coded coded(type, n, k);
        for (const Direction direction : kDirections)
          for (const index_t rows : {1, 2, 3, 4, 5, 6, 7, 8})
            check_block(direction, rows, whole(coded.weight));
      }
}

TEST_CASE("longer than the parts and strips of a product") {
  for (const WeightType& type : types(128)) {
    const Coded wide(type, 6, 4096 + 160), high(type, 300, 64);
    for (const Direction direction : kDirections)
      for (const index_t rows : {1, 3, 5, 8}) {
        check_block(direction, rows, whole(wide.weight));
        check_block(direction, rows, whole(high.weight));
      }
  }
}

TEST_CASE("blocks that begin within a group, or within rows that share a scale") {
  for (const index_t group : {32, 64, 0})
    for (const WeightType& type : types(group)) {
      const Coded coded(type, 300, 320);
      for (const Direction direction : kDirections)
        for (const Range rows : {Range{0, 300}, {16, 200}, {96, 290}, {5, 42}})
          for (const Range cols : {Range{0, 320}, {32, 256}, {16, 200}, {100, 130}})
            check_block(direction, 2, {&coded.weight, rows, cols});
    }
}

TEST_CASE("scales of any size") {
  for (const WeightType& type : types(32))
    for (const float scale : {0.0f, 1e-38f, 1e-45f, 0x1p-100f, 0x1p-101f, 0x1p100f, 0x1.8p100f, 3e38f, -1.0f,
                              std::numeric_limits<float>::infinity()})
      for (const Direction direction : kDirections) {
        Coded coded(type, 64, 64);
        coded.set_scale(coded.weight.scale_count() - 1, scale);
        check_block(direction, 2, whole(coded.weight));
      }
}

TEST_CASE("global scales of any size, and e4m3 scales that are 0 or NaN") {
  for (const GlobalScale rule : {GlobalScale::multiplies, GlobalScale::divides})
    for (const float global_scale : {1.0f, 1e-45f, 1e-38f, 0x1p-91f, 0x1p90f, 1e30f, 3e38f, -2.0f})
      for (const unsigned scale : {0u, 1u, 0x7eu, 0x7fu, 0x80u, 0xffu})
        for (const Direction direction : kDirections) {
          Coded coded({Format::nvfp4, ScaleType::e4m3, 1, 16, false, rule}, 64, 64);
          coded.set_global_scale(global_scale);
          coded.scales.data[coded.weight.scale_count() - 1] = static_cast<std::byte>(scale);
          check_block(direction, 2, whole(coded.weight));
        }
}

TEST_CASE("common shapes are multiplied without decoding them first") {
  const KernelSet set = kernel_set(best_isa(cpu_features()), cpu_features());
  if (set.gemv.coded == nullptr) return;
  KernelSet no_decode = set;  // which would crash
  no_decode.decode = {};
  for (const auto& [type, cols] :
       {std::pair<WeightType, index_t>{{Format::int8, ScaleType::f32, 1, 128}, 768},
        {{Format::int8, ScaleType::f32}, 96},
        {{Format::int4, ScaleType::bf16, 1, 32}, 768},
        {{Format::int4, ScaleType::f32, 1, 128, true}, 768},
        {{Format::fp8, ScaleType::f32, 128, 128}, 768},
        {{Format::mxfp4, ScaleType::e8m0, 1, 32}, 2880},
        {{Format::nvfp4, ScaleType::e4m3, 1, 16, false, GlobalScale::divides}, 768}}) {
    const Coded coded(type, 320, cols);
    for (const Direction direction : kDirections)
      for (const index_t rows : {1, 8}) {
        const index_t k = direction == Direction::nn ? 320 : cols;
        const std::vector<bf16_t> x = random_bf16(rows * k);
        const Rows of{view(x.data(), DType::bf16, rows, k)};
        const WeightBlock w = whole(coded.weight);
        CHECK(same_bits(product(no_decode, direction, of, w, false), product(set, direction, of, w, false)));
      }
  }
}
