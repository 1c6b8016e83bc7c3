#include "weights/convert.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cpu/processor.h"
#include "kernel_sets.h"

using namespace kt;

namespace {

constexpr Format kFormats[] = {Format::int8, Format::int4, Format::fp8, Format::mxfp4, Format::nvfp4};

struct Quantized {
  explicit Quantized(WeightType type, index_t rows, index_t cols) : weight{type, rows, cols} {
    bytes.resize(static_cast<std::size_t>(weight.bytes()));
    weight.codes = bytes.data();
    weight.scales = bytes.data() + weight.codes_bytes();
    weight.global_scale = weight.scales + weight.scales_bytes();
  }
  float scale(index_t place) const {
    float value;
    std::memcpy(&value, weight.scales + 4 * place, sizeof value);
    return value;
  }
  int code(index_t place) const { return static_cast<int>(weight.codes[place]); }

  MutableWeight weight;
  std::vector<std::byte> bytes;
};

const KernelSet& scalar_set() {
  static const KernelSet set = kernel_set("scalar", cpu_features());
  return set;
}

std::vector<float> normal(index_t n, float deviation = 0.02f) {
  std::mt19937 random(7);
  std::normal_distribution<float> distribution(0, deviation);
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& x : values) x = distribution(random);
  return values;
}

MatView matrix(const std::vector<float>& values, index_t rows) {
  return view(values.data(), DType::f32, rows, std::ssize(values) / rows);
}

double relative(const QuantError& sums) { return std::sqrt(sums.error / sums.norm); }

double error_on_normal(const WeightType& type, index_t rows, index_t cols) {
  Quantized to(type, rows, cols);
  return relative(quantize(scalar_set(), matrix(normal(rows * cols), rows), to.weight));
}

void refuses(const MatView& source, const Quantized& to, const char* complaint) {
  CHECK_THROWS_WITH_AS(quantize(scalar_set(), source, to.weight), doctest::Contains(complaint), ValueError);
}

}  // namespace

TEST_CASE("the error on normal weights") {
  const auto type = [](Format format, index_t scale_cols) {
    WeightType with = traits_of(format).quantized;
    with.scale_cols = scale_cols;
    return with;
  };
  // One scale a row: the longer the row, the farther out its largest weight.
  CHECK(error_on_normal(type(Format::int8, 0), 64, 256) < 0.0072);
  CHECK(error_on_normal(type(Format::int8, 0), 64, 768) < 0.0080);
  CHECK(error_on_normal(type(Format::int8, 0), 32, 2048) < 0.0085);
  CHECK(error_on_normal(type(Format::int8, 0), 16, 7168) < 0.0091);
  CHECK(error_on_normal(type(Format::int8, 128), 64, 768) < 0.0068);
  CHECK(error_on_normal(type(Format::int4, 32), 64, 768) < 0.083);
  CHECK(error_on_normal(type(Format::int4, 64), 64, 768) < 0.096);
  CHECK(error_on_normal(type(Format::int4, 128), 64, 768) < 0.107);
  CHECK(error_on_normal(traits_of(Format::fp8).quantized, 256, 300) < 0.0275);
  CHECK(error_on_normal({Format::fp8, ScaleType::f32, 1, 0, false}, 64, 768) < 0.0275);
  CHECK(error_on_normal(traits_of(Format::mxfp4).quantized, 64, 768) < 0.118);
  CHECK(error_on_normal(traits_of(Format::nvfp4).quantized, 64, 768) < 0.096);
}

TEST_CASE("weights that a format holds are kept") {
  // All numbers of a format.
  const auto kept = [](const WeightType& type, const std::vector<float>& weights) {
    CAPTURE(static_cast<int>(type.format));
    Quantized to(type, 1, std::ssize(weights));
    CHECK(quantize(scalar_set(), matrix(weights, 1), to.weight).error == 0);
  };
  std::vector<float> int8, fp8, mxfp4;
  for (int i = -128; i <= 127; ++i) int8.push_back(0.25f * static_cast<float>(i));
  kept({Format::int8, ScaleType::f32, 1, 0, false}, int8);
  for (const float x : {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f})
    for (const float scaled : {x * 0x1p-20f, -x * 0x1p-20f}) mxfp4.push_back(scaled);
  kept(traits_of(Format::mxfp4).quantized, mxfp4);
  kept(traits_of(Format::nvfp4).quantized, mxfp4);
  for (int exponent = 0; exponent < 16; ++exponent)
    for (int mantissa = 0; mantissa < (exponent == 15 ? 7 : 8); ++mantissa) {
      const float x =
          std::ldexp(static_cast<float>(exponent ? 8 + mantissa : mantissa), std::max(exponent, 1) - 10);
      fp8.push_back(x);
      fp8.push_back(-x);
    }
  kept({Format::fp8, ScaleType::f32, 1, 0, false}, fp8);
}

TEST_CASE("weights between two numbers take the nearest, and of equally near ones the even code") {
  // The first weight fixes the scale at 1.
  Quantized fp8({Format::fp8, ScaleType::f32, 1, 0, false}, 1, 9);
  quantize(scalar_set(), matrix({448, 17, -19, 17.01f, 0.125f, 0x1p-10f, 0x3p-10f, -0x1.01p-10f, 464e-9f}, 1),
           fp8.weight);
  CHECK(fp8.scale(0) == 1);
  const int wanted[] = {0x7e, 0x58, 0xda, 0x59, 0x20, 0, 2, 0x81, 0};
  for (int j = 0; j < 9; ++j) CHECK(fp8.code(j) == wanted[j]);

  std::vector<float> weights = {6, 0.25f, 0.75f, -1.25f, 1.75f, 2.5f, 3.5f, -5};
  weights.resize(32, 0.5f);
  Quantized mxfp4(traits_of(Format::mxfp4).quantized, 1, 32);
  quantize(scalar_set(), matrix(weights, 1), mxfp4.weight);
  CHECK(static_cast<int>(mxfp4.weight.scales[0]) == 127);
  for (const auto& [place, codes] : {std::pair{0, 0x07}, {1, 0xa2}, {2, 0x44}, {3, 0xe6}, {4, 0x11}})
    CHECK(mxfp4.code(place) == codes);

  weights = {-8, 0.5f, 1.5f, 2.5f, -0.5f, -1.5f, 7, -7};
  weights.resize(32, 6.0f);
  Quantized int4(traits_of(Format::int4).quantized, 1, 32);
  quantize(scalar_set(), matrix(weights, 1), int4.weight);
  for (const auto& [place, codes] : {std::pair{0, 0x80}, {1, 0xaa}, {2, 0x68}, {3, 0x1f}, {4, 0xee}})
    CHECK(int4.code(place) == codes);
}

TEST_CASE("whatever the source's type and the kernel set, the same codes and errors") {
  const index_t rows = 131, cols = 293;
  const std::vector<float> weights = normal(rows * cols);
  std::vector<bf16_t> rounded;
  std::vector<float> widened;
  for (const float x : weights) {
    rounded.push_back(to_bf16(x));
    widened.push_back(to_float(rounded.back()));
  }
  for (const Format format : kFormats) {
    CAPTURE(static_cast<int>(format));
    Quantized wanted(traits_of(format).quantized, rows, cols);
    const QuantError error = quantize(scalar_set(), matrix(widened, rows), wanted.weight);
    for_every_available_set([&](const KernelSet& set) {
      Quantized found(traits_of(format).quantized, rows, cols);
      const QuantError its = quantize(set, view(rounded.data(), DType::bf16, rows, cols), found.weight);
      CHECK(found.bytes == wanted.bytes);
      CHECK(its.error == error.error);
      CHECK(its.norm == error.norm);
    });
  }
}

TEST_CASE("zeros have the scale 1, and the largest and smallest weights stay finite") {
  for (const Format format : kFormats) {
    CAPTURE(static_cast<int>(format));
    const std::vector<float> zeros(64, 0.0f);
    Quantized to(traits_of(format).quantized, 1, 64);
    const QuantError none = quantize(scalar_set(), matrix(zeros, 1), to.weight);
    CHECK(none.error == 0);
    CHECK(none.norm == 0);
    if (to.weight.type.scale == ScaleType::f32) CHECK(to.scale(0) == 1);
    CHECK(to.code(0) == (format == Format::int4 ? 0x88 : 0));

    for (const float peak : {1e-45f, 1e-38f, 1e-30f, 1e30f, 3e38f}) {
      CAPTURE(peak);
      const std::vector<float> weights = {peak, -peak, peak / 2, 0};
      Quantized extreme(traits_of(format).quantized, 1, 4);
      const double error = relative(quantize(scalar_set(), matrix(weights, 1), extreme.weight));
      CHECK(error <= (peak < 1e-35f ? 1.0 : 0.2));
    }
  }
}

TEST_CASE("weights that are not finite, and types and shapes that do not fit, are refused") {
  std::vector<float> weights = normal(6 * 40);
  for (const Format format : kFormats) {
    Quantized to(traits_of(format).quantized, 6, 40);
    weights[5 * 40 + 39] = std::numeric_limits<float>::infinity();
    refuses(matrix(weights, 6), to, "row 5, column 39 is inf");
    weights[2 * 40 + 7] = std::numeric_limits<float>::quiet_NaN();
    refuses(matrix(weights, 6), to, "row 2, column 7 is nan");
    weights = normal(6 * 40);
    refuses(matrix(weights, 8), to, "8 x 30, wanted 6 x 40");
    refuses(view(weights.data(), DType::f16, 6, 40), to, "float16");
  }
  for (const WeightType& type :
       {WeightType{Format::bf16, ScaleType::none, 1, 0, false},
        WeightType{Format::int4, ScaleType::bf16, 1, 32, true},
        WeightType{Format::int8, ScaleType::f32, 1, 24, false},
        WeightType{Format::nvfp4, ScaleType::e4m3, 1, 16, false, GlobalScale::divides}})
    refuses(matrix(weights, 6), Quantized(type, 6, 40), "cannot quantise to");
}
