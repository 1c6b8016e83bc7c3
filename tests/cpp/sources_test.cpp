// What LayerSource reads, decoded by the scalar kernels, against what the file was made to stand for.
// test_sources.py has the formats in full; here are small layers of each, scales and biases.
#include <doctest/doctest.h>

#include <bit>
#include <cmath>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "kernels/registry.h"
#include "temp_files.h"
#include "weights/convert.h"
#include "weights/expert_index.h"

using namespace kt;
using namespace kt::test;

namespace {

constexpr index_t H = 64, I = 32;
constexpr int E = 2;
const std::string root = "model.layers.0.mlp.experts.";
const std::vector<std::string> words{"gate_proj", "up_proj", "down_proj"};

index_t rows_of(Projection p) { return p == Projection::down ? H : I; }
index_t cols_of(Projection p) { return p == Projection::down ? I : H; }

// Any number that is the same whenever it is asked for.
unsigned hash(int expert, Projection p, index_t row, index_t col) {
  auto x = static_cast<unsigned>(((expert * 3 + static_cast<int>(p)) * 977 + row) * 1013 + col) * 2654435761u;
  return x ^ x >> 15;
}
int code(int bits, int expert, Projection p, index_t row, index_t col) {
  return static_cast<int>(hash(expert, p, row, col) % (1u << bits));
}
float scale(int expert, Projection p, index_t row, index_t group) {
  return 0.01f + 0.001f * static_cast<float>(hash(expert + 7, p, row, group) % 64);
}
using Value = std::function<float(int expert, Projection p, index_t row, index_t col)>;

const KernelSet& scalar() {
  static const KernelSet set = kernel_set("scalar", 0);
  return set;
}

struct Memory {
  std::vector<std::byte> codes, scales, zeros;
  MutableWeight weight;

  explicit Memory(MutableWeight w)
      : codes(static_cast<std::size_t>(w.codes_bytes())),
        scales(static_cast<std::size_t>(w.scales_bytes())),
        zeros(static_cast<std::size_t>(w.zeros_bytes())),
        weight(w) {
    weight.codes = codes.data(), weight.scales = scales.data();
    weight.zeros = zeros.empty() ? nullptr : zeros.data();
  }
};

std::vector<bf16_t> decoded(const MutableWeight& m) {
  std::vector<bf16_t> out(static_cast<std::size_t>(m.rows * m.cols));
  const DecodeKernels& kernels = scalar().decode;
  for (index_t row = 0; row < m.rows; ++row) {
    const std::byte* codes = m.codes + row * m.code_bytes(m.cols);
    bf16_t* to = out.data() + row * m.cols;
    if (m.type.format == Format::bf16) {
      std::memcpy(to, codes, static_cast<std::size_t>(m.cols) * 2);
      continue;
    }
    const index_t first = row / m.type.scale_rows * ceil_div(m.cols, m.group());
    const ScaleKind kind = m.type.scale == ScaleType::f32    ? kScaleF32
                           : m.type.scale == ScaleType::bf16 ? kScaleBF16
                                                             : kScaleE8M0;
    const CodedRows coded{1,
                          static_cast<int>(m.cols),
                          reinterpret_cast<const std::uint8_t*>(codes),
                          0,
                          kind,
                          m.scales + first * size_of(m.type.scale),
                          0,
                          m.zeros ? reinterpret_cast<const std::uint8_t*>(m.zeros) + first : nullptr,
                          static_cast<int>(m.group())};
    DecodeCodes* const decode[] = {nullptr, kernels.from_int8, kernels.from_int4, kernels.from_fp8,
                                   kernels.from_mxfp4};
    decode[static_cast<std::size_t>(m.type.format)](coded, to, m.cols);
  }
  return out;
}

std::shared_ptr<const LayerSource> open(const Writer& writer, const TempDir& dir) {
  return ExpertIndex(std::make_shared<const Checkpoint>(writer.write_to(dir / "m.safetensors"))).open(0);
}

void check_values(const LayerSource& source, const Value& value) {
  Arena scratch;
  for (int e = 0; e < E; ++e) {
    for (const Projection p : projections) {
      const Memory memory(source.info().matrix(p));
      source.read(e, p, memory.weight, scratch, scalar().decode);
      const auto found = decoded(memory.weight);
      index_t wrong = 0;
      for (index_t row = 0; row < rows_of(p); ++row)
        for (index_t col = 0; col < cols_of(p); ++col)
          wrong += found[static_cast<std::size_t>(row * cols_of(p) + col)] != to_bf16(value(e, p, row, col));
      CAPTURE(e);
      CAPTURE(name_of(p));
      CHECK(wrong == 0);
      if (!source.info().mappable) continue;
      const Weight mapped = source.map(e, p);
      CHECK(std::memcmp(mapped.codes, memory.codes.data(), memory.codes.size()) == 0);
      CHECK((memory.scales.empty() ||
             std::memcmp(mapped.scales, memory.scales.data(), memory.scales.size()) == 0));
    }
  }
}

void check_info(const LayerSource& source, std::string_view layout, bool mappable, WeightType type) {
  const LayerInfo& info = source.info();
  CHECK(info.num_experts == E);
  CHECK(info.hidden_size == H);
  CHECK(info.intermediate_size == I);
  CHECK(info.layout == layout);
  CHECK(info.mappable == mappable);
  CHECK(info.types[0] == type);
}

// Elements of [rows, cols] by a function of row and column.
template <class T, class F>
std::vector<T> filled(index_t rows, index_t cols, F element) {
  std::vector<T> out;
  for (index_t row = 0; row < rows; ++row)
    for (index_t col = 0; col < cols; ++col) out.push_back(static_cast<T>(element(row, col)));
  return out;
}

// Adds what `add(writer, prefix, expert, p)` adds for each matrix.
template <class Add>
Writer per_expert(Add add) {
  Writer writer;
  for (int e = 0; e < E; ++e)
    for (const Projection p : projections)
      add(writer, message("{}{}.{}.", root, e, words[index_of(p)]), e, p);
  return writer;
}

std::uint32_t word(const std::function<unsigned(int)>& nibble) {
  std::uint32_t out = 0;
  for (int n = 0; n < 8; ++n) out |= nibble(n) << 4 * n;
  return out;
}

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
  source->read_bias(1, Projection::up, bias.data(), scratch, scalar().decode);
  CHECK(to_float(bias[5]) == 111);
  source->read_bias(1, Projection::gate, bias.data(), scratch, scalar().decode);
  CHECK(to_float(bias[5]) == 110);
  source->read_bias(1, Projection::down, bias.data(), scratch, scalar().decode);
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
  source->read_bias(0, Projection::down, bias.data(), scratch, scalar().decode);
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

TEST_CASE("compressed-tensors, with and without zero points") {
  const TempDir dir;
  for (const bool zeros : {false, true}) {
    const auto zero = [&](int e, Projection p, index_t r, index_t g) {
      return zeros ? code(4, e + 3, p, r, g) : 8;
    };
    const auto writer = per_expert([&](Writer& to, const std::string& at, int e, Projection p) {
      const index_t rows = rows_of(p), cols = cols_of(p), groups = cols / 32;
      to.add(at + "weight_packed", "I32", {rows, cols / 8},
             filled<std::uint32_t>(rows, cols / 8, [&](auto r, auto q) {
               return word([&](int n) { return static_cast<unsigned>(code(4, e, p, r, 8 * q + n)); });
             }));
      to.add(at + "weight_scale", "BF16", {rows, groups},
             filled<bf16_t>(rows, groups, [&](auto r, auto g) { return to_bf16(scale(e, p, r, g)); }));
      to.add(at + "weight_shape", "I64", {2}, std::vector<std::int64_t>{rows, cols});
      if (zeros)
        to.add(at + "weight_zero_point", "I32", {rows / 8, groups},
               filled<std::uint32_t>(rows / 8, groups, [&](auto q, auto g) {
                 return word([&](int n) { return static_cast<unsigned>(zero(e, p, 8 * q + n, g)); });
               }));
    });
    const auto source = open(writer, dir);
    check_info(*source, "compressed-tensors", !zeros, {Format::int4, ScaleType::bf16, 1, 32, zeros});
    check_values(*source, [&](auto e, auto p, auto r, auto c) {
      return static_cast<float>(code(4, e, p, r, c) - zero(e, p, r, c / 32)) *
             to_float(to_bf16(scale(e, p, r, c / 32)));
    });
  }
}

TEST_CASE("GPTQ and AWQ: words along the inputs or the outputs, zero points only where one is not 8") {
  const TempDir dir;
  constexpr int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (const bool awq : {false, true}) {
    for (const bool zeros : {false, true}) {
      const auto zero = [&](int e, Projection p, index_t r, index_t g) {
        return zeros ? code(4, e + 3, p, r, g) : 8;
      };
      const auto output = [&](index_t q, int n) { return 8 * q + (awq ? awq_order[n] : n); };
      const auto writer = per_expert([&](Writer& to, const std::string& at, int e, Projection p) {
        const index_t rows = rows_of(p), cols = cols_of(p), groups = cols / 32;
        if (awq) {
          to.add(at + "qweight", "I32", {cols, rows / 8},
                 filled<std::uint32_t>(cols, rows / 8, [&](auto k, auto q) {
                   return word([&](int n) { return static_cast<unsigned>(code(4, e, p, output(q, n), k)); });
                 }));
        } else {
          to.add(at + "qweight", "I32", {cols / 8, rows},
                 filled<std::uint32_t>(cols / 8, rows, [&](auto q, auto j) {
                   return word([&](int n) { return static_cast<unsigned>(code(4, e, p, j, 8 * q + n)); });
                 }));
        }
        to.add(at + "qzeros", "I32", {groups, rows / 8},
               filled<std::uint32_t>(groups, rows / 8, [&](auto g, auto q) {
                 return word([&](int n) {
                   return static_cast<unsigned>(zero(e, p, output(q, n), g) - (awq ? 0 : 1)) & 15u;
                 });
               }));
        to.add(at + "scales", "BF16", {groups, rows},
               filled<bf16_t>(groups, rows, [&](auto g, auto r) { return to_bf16(scale(e, p, r, g)); }));
      });
      const auto source = open(writer, dir);
      check_info(*source, awq ? "awq" : "gptq", false, {Format::int4, ScaleType::f32, 1, 32, zeros});
      check_values(*source, [&](auto e, auto p, auto r, auto c) {
        return static_cast<float>(code(4, e, p, r, c) - zero(e, p, r, c / 32)) *
               to_float(to_bf16(scale(e, p, r, c / 32)));
      });
    }
  }
}

TEST_CASE("MXFP4: gate and up alternate between rows") {
  const TempDir dir;
  constexpr float e2m1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  const auto exponent = [](int e, Projection p, index_t r, index_t g) {
    return 110 + code(4, e + 5, p, r, g);
  };
  Writer writer;
  const auto add = [&](const std::string& name, std::vector<Projection> alternating) {
    const Projection first = alternating.front();
    const index_t rows = rows_of(first), cols = cols_of(first), all = rows * std::ssize(alternating);
    std::vector<std::uint8_t> blocks, scales;
    for (int e = 0; e < E; ++e) {
      for (index_t r = 0; r < rows; ++r) {
        for (const Projection p : alternating) {
          for (index_t c = 0; c < cols; c += 2)
            blocks.push_back(static_cast<std::uint8_t>(code(4, e, p, r, c) | code(4, e, p, r, c + 1) << 4));
          for (index_t g = 0; g < cols / 32; ++g)
            scales.push_back(static_cast<std::uint8_t>(exponent(e, p, r, g)));
        }
      }
    }
    writer.add(root + name + "_blocks", "U8", {E, all, cols / 32, 16}, blocks);
    writer.add(root + name + "_scales", "U8", {E, all, cols / 32}, scales);
  };
  add("gate_up_proj", {Projection::gate, Projection::up});
  add("down_proj", {Projection::down});
  const auto source = open(writer, dir);
  check_info(*source, "mxfp4", false, {Format::mxfp4, ScaleType::e8m0, 1, 32});
  check_values(*source, [&](auto e, auto p, auto r, auto c) {
    const int found = code(4, e, p, r, c);
    return std::ldexp(found < 8 ? e2m1[found] : -e2m1[found - 8], exponent(e, p, r, c / 32) - 127);
  });
}

TEST_CASE("kt-kernel's int8 tiles, a scale a row") {
  const TempDir dir;
  Writer writer;
  const std::vector<std::string> names{"gate", "up", "down"};
  constexpr index_t side = 64;  // one tile of 32 x 64 above the other
  const auto value = [](int e, Projection p, index_t r, index_t c) {
    return static_cast<std::int8_t>(code(8, e, p, r, c));
  };
  for (int e = 0; e < E; ++e) {
    for (const Projection p : projections) {
      std::vector<std::int8_t> tiles;
      for (index_t half = 0; half < side; half += 16)
        for (index_t k = 0; k < side; k += 4)
          for (index_t r = half; r < half + 16; ++r)
            for (index_t c = k; c < k + 4; ++c) tiles.push_back(value(e, p, r, c));
      const auto at = message("blk.0.ffn_{}_exps.{}.numa.0.", names[index_of(p)], e);
      writer.add(at + "weight", "I8", {side * side}, tiles);
      writer.add(at + "scale", "F32", {side},
                 filled<float>(side, 1, [&](auto r, auto) { return scale(e, p, r, 0); }));
    }
  }
  const auto source = open(writer, dir);
  CHECK(source->info().layout == "kt");
  Arena scratch;
  for (int e = 0; e < E; ++e) {
    for (const Projection p : projections) {
      const Memory memory(source->info().matrix(p));
      source->read(e, p, memory.weight, scratch, scalar().decode);
      const auto found = decoded(memory.weight);
      index_t wrong = 0;
      for (index_t r = 0; r < side; ++r)
        for (index_t c = 0; c < side; ++c)
          wrong +=
              found[static_cast<std::size_t>(r * side + c)] != to_bf16(value(e, p, r, c) * scale(e, p, r, 0));
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("scales that are NaN, infinite or 0 are found") {
  const float inf = std::numeric_limits<float>::infinity();
  std::vector<float> scales(37, 0.5f);
  scales[3] = -0.5f, scales[4] = 1e-44f, scales[5] = 3e38f;
  std::vector<bf16_t> halves(37, to_bf16(0.5f));
  const auto found = [](ScaleType type, const auto& values) {
    return bad_scale(type, reinterpret_cast<const std::byte*>(values.data()), std::ssize(values));
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
}

TEST_CASE("every half is the same as fp32") {
  std::vector<std::uint16_t> halves(65536);
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = static_cast<std::uint16_t>(i);
  std::vector<float> floats(halves.size());
  f16_to_f32(halves, floats.data());
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
