// LayerSource on floats, int8 and fp8, and the conversions that all sources share.
// test_sources.py has the formats in full; here are small layers of each, scales and biases.
#include <doctest/doctest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/registry.h"
#include "small_layers.h"
#include "weights/grids.h"

using namespace kt;
using namespace kt::test;

namespace {

float bf16_value(int e, Projection p, index_t row, index_t col) {
  return static_cast<float>(code(7, e, p, row, col)) - 64;  // exact in bf16
}

}  // namespace

TEST_CASE("gpt-oss: gate and up alternate along the last dimension, biases too") {
  const TempDir dir;
  Writer writer;
  std::vector<bf16_t> both, down, both_bias, down_bias;
  for (int e = 0; e < E; ++e) {
    for (index_t k = 0; k < H; ++k)
      for (index_t j = 0; j < I; ++j)
        for (const Projection p : {Projection::gate, Projection::up})
          both.push_back(to_bf16(bf16_value(e, p, j, k)));
    for (index_t k = 0; k < I; ++k)
      for (index_t j = 0; j < H; ++j) down.push_back(to_bf16(bf16_value(e, Projection::down, j, k)));
    for (index_t j = 0; j < 2 * I; ++j) both_bias.push_back(to_bf16(static_cast<float>(100 * e + j)));
    for (index_t j = 0; j < H; ++j) down_bias.push_back(to_bf16(static_cast<float>(100 * e - j)));
  }
  writer.add(root + "gate_up_proj", "BF16", {E, H, 2 * I}, both)
      .add(root + "down_proj", "BF16", {E, I, H}, down);
  writer.add(root + "gate_up_proj_bias", "BF16", {E, 2 * I}, both_bias);
  writer.add(root + "down_proj_bias", "BF16", {E, H}, down_bias);
  const auto source = open(writer, dir);
  check_info(*source, "fused, transposed, interleaved", false, {});
  check_values(*source, bf16_value);
  REQUIRE(source->info().biases);
  Arena scratch;
  std::vector<bf16_t> bias(H);
  source->read_bias(1, Projection::up, bias.data(), scratch, scalar_set().decode);
  CHECK(to_float(bias[5]) == 111);
  source->read_bias(1, Projection::gate, bias.data(), scratch, scalar_set().decode);
  CHECK(to_float(bias[5]) == 110);
  source->read_bias(1, Projection::down, bias.data(), scratch, scalar_set().decode);
  CHECK(to_float(bias[5]) == 95);
}

TEST_CASE("biases of each expert are rounded to bf16") {
  const TempDir dir;
  const auto writer = per_expert([](Writer& to, const std::string& at, int e, Projection p) {
    const index_t rows = rows_of(p);
    to.add(at + "weight", "F32", {rows, cols_of(p)},
           filled<float>(rows, cols_of(p), [&](auto r, auto c) { return bf16_value(e, p, r, c) + 1e-4f; }));
    to.add(at + "bias", "F32", {rows},
           filled<float>(rows, 1, [&](auto r, auto) { return 1.0f + 1e-3f * r; }));
  });
  const auto source = open(writer, dir);
  check_info(*source, "per-expert", false, {});
  check_values(*source, [](auto e, auto p, auto r, auto c) { return bf16_value(e, p, r, c) + 1e-4f; });
  Arena scratch;
  std::vector<bf16_t> bias(H);
  source->read_bias(0, Projection::down, bias.data(), scratch, scalar_set().decode);
  for (index_t row = 0; row < H; ++row)
    CHECK(bias[static_cast<std::size_t>(row)] == to_bf16(1.0f + 1e-3f * static_cast<float>(row)));
}

TEST_CASE("int8 and fp8 with a scale a row") {
  const TempDir dir;
  const auto make = [&](std::string_view type) {
    return per_expert([&](Writer& to, const std::string& at, int e, Projection p) {
      const index_t rows = rows_of(p), cols = cols_of(p);
      // fp8: positive powers of two, exponent code 4..11.
      to.add(at + "weight", type, {rows, cols}, filled<std::uint8_t>(rows, cols, [&](auto r, auto c) {
               return type == "I8" ? code(8, e, p, r, c) : (code(3, e, p, r, c) + 4) << 3;
             }));
      to.add(at + "weight_scale", "F32", {rows, 1},
             filled<float>(rows, 1, [&](auto r, auto) { return scale(e, p, r, 0); }));
    });
  };
  const auto int8 = open(make("I8"), dir);
  check_info(*int8, "per-expert", true, {Format::int8, ScaleType::f32, 1, 0});
  check_values(*int8, [](auto e, auto p, auto r, auto c) {
    return static_cast<float>(static_cast<std::int8_t>(code(8, e, p, r, c))) * scale(e, p, r, 0);
  });
  const auto fp8 = open(make("F8_E4M3"), dir);
  check_info(*fp8, "per-expert", true, {Format::fp8, ScaleType::f32, 1, 0});
  check_values(*fp8, [](auto e, auto p, auto r, auto c) {
    return std::ldexp(scale(e, p, r, 0), code(3, e, p, r, c) - 3);
  });
}

TEST_CASE("fused fp8 with blocks of 128 x 128 that would mix gate and up is refused") {
  const TempDir dir;
  Writer writer;
  writer.add(root + "gate_up_proj", "F8_E4M3", {E, 2 * I, H}, 1)
      .add(root + "down_proj", "F8_E4M3", {E, H, I}, 1);
  writer.add(root + "gate_up_proj_scale_inv", "F32", {E, 1, 1}, 4);
  writer.add(root + "down_proj_scale_inv", "F32", {E, 1, 1}, 4);
  CHECK(contains(message_of<ValueError>([&] { open(writer, dir); }), "rows to be a multiple of 128"));
}

TEST_CASE("scales that are NaN, infinite or 0 are found") {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> scales(37, 0.5f);
  scales[3] = -0.5f, scales[4] = 1e-44f, scales[5] = 3e38f;
  std::vector<bf16_t> halves(37, to_bf16(0.5f));
  const auto found = [](ScaleType type, const auto& values) {
    return grids::bad_scale(type, reinterpret_cast<const std::byte*>(values.data()), std::ssize(values));
  };
  CHECK_FALSE(found(ScaleType::f32, scales));
  CHECK_FALSE(found(ScaleType::bf16, halves));
  for (const float bad : {0.0f, -0.0f, inf, -inf, std::nanf(""), -std::nanf("")}) {
    for (const std::size_t at : {0u, 17u, 36u}) {
      auto copy = scales;
      copy[at] = bad;
      CHECK(found(ScaleType::f32, copy) == static_cast<index_t>(at));
      auto half_copy = halves;
      half_copy[at] = to_bf16(bad);
      CHECK(found(ScaleType::bf16, half_copy) == static_cast<index_t>(at));
    }
  }
  std::vector<std::uint8_t> exponents(37, 0);
  CHECK_FALSE(found(ScaleType::e8m0, exponents));
  exponents[30] = 255;
  CHECK(found(ScaleType::e8m0, exponents) == 30);
  CHECK_FALSE(found(ScaleType::e4m3, std::vector<std::uint8_t>{0, 0x7e, 0x80, 0xfe}));
  CHECK(found(ScaleType::e4m3, std::vector<std::uint8_t>{1, 0x7f}) == 1);
  CHECK(found(ScaleType::e4m3, std::vector<std::uint8_t>{0xff, 0x7f}) == 0);
}

TEST_CASE("every half is the same as fp32") {
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  std::vector<float> floats(halves.size());
  std::ranges::transform(halves, floats.begin(), scalar::half_to_float);
  for (std::size_t i = 0; i < halves.size(); ++i) {
    const int exponent = static_cast<int>(i >> 10 & 31), mantissa = static_cast<int>(i & 1023);
    const float sign = i >> 15 ? -1.0f : 1.0f;
    const float finite = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24)
                                       : std::ldexp(static_cast<float>(1024 + mantissa), exponent - 25);
    if (exponent == 31 && mantissa != 0) {
      CHECK(std::isnan(floats[i]));
    } else {
      const float want = sign * (exponent == 31 ? std::numeric_limits<float>::infinity() : finite);
      if (std::bit_cast<std::uint32_t>(floats[i]) != std::bit_cast<std::uint32_t>(want)) FAIL(i);
    }
  }
}
