// LayerSource on words of int4, MXFP4 and kt-kernel's tiles.
// test_sources.py has the formats in full; here are small layers of each.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "small_layers.h"

using namespace kt;
using namespace kt::test;

namespace {

// [rows, cols] words: nibble(row, column, n) is the n-th of one, from the lowest.
template <class F>
std::vector<std::uint32_t> filled_words(index_t rows, index_t cols, F nibble) {
  return filled<std::uint32_t>(rows, cols, [&](auto row, auto col) {
    std::uint32_t word = 0;
    for (int n = 0; n < 8; ++n) word |= (static_cast<std::uint32_t>(nibble(row, col, n)) & 15u) << 4 * n;
    return word;
  });
}

// Of the int4 layers, in groups of 32 columns; 8 stands for no zero points.
int zero_point(bool zeros, int e, Projection p, index_t row, index_t group) {
  return zeros ? code(4, e + 3, p, row, group) : 8;
}

void check_int4(const LayerSource& source, bool zeros) {
  check_values(source, [&](auto e, auto p, auto r, auto c) {
    return static_cast<float>(code(4, e, p, r, c) - zero_point(zeros, e, p, r, c / 32)) *
           to_float(to_bf16(scale(e, p, r, c / 32)));
  });
}

}  // namespace

TEST_CASE("compressed-tensors, with and without zero points") {
  const TempDir dir;
  for (const bool zeros : {false, true}) {
    const auto writer = per_expert([&](Writer& to, const std::string& at, int e, Projection p) {
      const index_t rows = rows_of(p), cols = cols_of(p), groups = cols / 32;
      to.add(
          at + "weight_packed", "I32", {rows, cols / 8},
          filled_words(rows, cols / 8, [&](auto r, auto q, int n) { return code(4, e, p, r, 8 * q + n); }));
      to.add(at + "weight_scale", "BF16", {rows, groups},
             filled<bf16_t>(rows, groups, [&](auto r, auto g) { return to_bf16(scale(e, p, r, g)); }));
      to.add(at + "weight_shape", "I64", {2}, std::vector<std::int64_t>{rows, cols});
      if (zeros)
        to.add(at + "weight_zero_point", "I32", {rows / 8, groups},
               filled_words(rows / 8, groups,
                            [&](auto q, auto g, int n) { return zero_point(zeros, e, p, 8 * q + n, g); }));
    });
    const auto source = open(writer, dir);
    check_info(*source, "compressed-tensors", !zeros, {Format::int4, ScaleType::bf16, 1, 32, zeros});
    check_int4(*source, zeros);
  }
}

TEST_CASE("GPTQ and AWQ: words along the inputs or the outputs, zero points only where one is not 8") {
  const TempDir dir;
  constexpr int awq_order[8] = {0, 2, 4, 6, 1, 3, 5, 7};
  for (const bool awq : {false, true}) {
    for (const bool zeros : {false, true}) {
      const auto output = [&](index_t q, int n) { return 8 * q + (awq ? awq_order[n] : n); };
      const auto writer = per_expert([&](Writer& to, const std::string& at, int e, Projection p) {
        const index_t rows = rows_of(p), cols = cols_of(p), groups = cols / 32;
        if (awq) {
          to.add(at + "qweight", "I32", {cols, rows / 8},
                 filled_words(cols, rows / 8,
                              [&](auto k, auto q, int n) { return code(4, e, p, output(q, n), k); }));
        } else {
          to.add(at + "qweight", "I32", {cols / 8, rows},
                 filled_words(cols / 8, rows,
                              [&](auto q, auto j, int n) { return code(4, e, p, j, 8 * q + n); }));
        }
        to.add(at + "qzeros", "I32", {groups, rows / 8},
               filled_words(groups, rows / 8, [&](auto g, auto q, int n) {
                 return zero_point(zeros, e, p, output(q, n), g) - (awq ? 0 : 1);
               }));
        to.add(at + "scales", "BF16", {groups, rows},
               filled<bf16_t>(groups, rows, [&](auto g, auto r) { return to_bf16(scale(e, p, r, g)); }));
      });
      const auto source = open(writer, dir);
      check_info(*source, awq ? "awq" : "gptq", false, {Format::int4, ScaleType::f32, 1, 32, zeros});
      check_int4(*source, zeros);
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

TEST_CASE("NVFP4: compressed-tensors divides scales by the global one, ModelOpt multiplies them") {
  constexpr float e2m1[8] = {0, 0.5f, 1, 1.5f, 2, 3, 4, 6};
  for (const bool packed : {true, false}) {
    const TempDir dir;
    Writer writer;
    const auto scale_code = [](int e, Projection p, index_t r, index_t g) {
      return 0x30 + code(4, e + 5, p, r, g);  // 2^-1 to 2^1
    };
    const auto global_scale = [](int e, Projection p) { return scale(e, p, 7, 7); };
    for (int e = 0; e < E; ++e)
      for (const Projection p : projections) {
        const std::string at = root + std::to_string(e) + "." + words[index_of(p)] + ".";
        std::vector<std::uint8_t> codes, scales;
        for (index_t r = 0; r < rows_of(p); ++r) {
          for (index_t c = 0; c < cols_of(p); c += 2)
            codes.push_back(static_cast<std::uint8_t>(code(4, e, p, r, c) | code(4, e, p, r, c + 1) << 4));
          for (index_t g = 0; g < cols_of(p) / 16; ++g)
            scales.push_back(static_cast<std::uint8_t>(scale_code(e, p, r, g)));
        }
        writer.add(at + (packed ? "weight_packed" : "weight"), "U8", {rows_of(p), cols_of(p) / 2}, codes);
        writer.add(at + "weight_scale", "F8_E4M3", {rows_of(p), cols_of(p) / 16}, scales);
        const std::vector<float> one{global_scale(e, p)};
        if (packed)
          writer.add(at + "weight_global_scale", "F32", {1}, one);
        else
          writer.add(at + "weight_scale_2", "F32", {}, one);
      }
    const auto source = open(writer, dir);
    check_info(*source, packed ? "nvfp4, compressed-tensors" : "nvfp4, modelopt", true,
               {Format::nvfp4, ScaleType::e4m3, 1, 16, false,
                packed ? GlobalScale::divides : GlobalScale::multiplies});
    check_values(*source, [&](auto e, auto p, auto r, auto c) {
      const int found = code(4, e, p, r, c), stored = scale_code(e, p, r, c / 16);
      const float block = std::ldexp(static_cast<float>(8 + stored % 8), stored / 8 - 10);
      const float factor = packed ? block / global_scale(e, p) : block * global_scale(e, p);
      return (found < 8 ? e2m1[found] : -e2m1[found - 8]) * factor;
    });
  }
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
  check_values(*source,
               [&](auto e, auto p, auto r, auto c) { return value(e, p, r, c) * scale(e, p, r, 0); });
}
