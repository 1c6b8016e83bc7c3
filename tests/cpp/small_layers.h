// Small layers of every encoding: what their files hold, and what LayerSource reads of them, decoded by the
// scalar kernels, against what they were made to stand for.
#pragma once

#include <doctest/doctest.h>

#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gemm/decode.h"
#include "kernels/registry.h"
#include "temp_files.h"
#include "weights/expert_index.h"

namespace kt::test {

inline constexpr index_t H = 64, I = 32;
inline constexpr int E = 2;
inline const std::string root = "model.layers.0.mlp.experts.";
inline const std::vector<std::string> words{"gate_proj", "up_proj", "down_proj"};

inline index_t rows_of(Projection p) { return p == Projection::down ? H : I; }
inline index_t cols_of(Projection p) { return p == Projection::down ? I : H; }

// Any number that is the same whenever it is asked for.
inline unsigned hash(int expert, Projection p, index_t row, index_t col) {
  auto x = static_cast<unsigned>(((expert * 3 + static_cast<int>(p)) * 977 + row) * 1013 + col) * 2654435761u;
  return x ^ x >> 15;
}
inline int code(int bits, int expert, Projection p, index_t row, index_t col) {
  return static_cast<int>(hash(expert, p, row, col) % (1u << bits));
}
inline float scale(int expert, Projection p, index_t row, index_t group) {
  return 0.01f + 0.001f * static_cast<float>(hash(expert + 7, p, row, group) % 64);
}
using Value = std::function<float(int expert, Projection p, index_t row, index_t col)>;

inline const KernelSet& scalar_set() {
  static const KernelSet set = kernel_set("scalar", 0);
  return set;
}

struct Memory {
  std::vector<std::byte> codes, scales, zeros, global_scale;
  MutableWeight weight;

  explicit Memory(MutableWeight w)
      : codes(static_cast<std::size_t>(w.codes_bytes())),
        scales(static_cast<std::size_t>(w.scales_bytes())),
        zeros(static_cast<std::size_t>(w.zeros_bytes())),
        global_scale(static_cast<std::size_t>(w.global_scale_bytes())),
        weight(w) {
    weight.codes = codes.data(), weight.scales = scales.data();
    weight.zeros = zeros.empty() ? nullptr : zeros.data();
    weight.global_scale = global_scale.empty() ? nullptr : global_scale.data();
  }
};

inline std::vector<bf16_t> decoded(const MutableWeight& m) {
  std::vector<bf16_t> out(static_cast<std::size_t>(m.rows * m.cols));
  const Weight w = frozen(m);
  decode(scalar_set(), whole(w), out.data(), m.cols);
  return out;
}

inline std::shared_ptr<const LayerSource> open(const Writer& writer, const TempDir& dir) {
  return ExpertIndex(std::make_shared<const Checkpoint>(writer.write_to(dir / "m.safetensors"))).open(0);
}

inline void check_values(const LayerSource& source, const Value& value) {
  const LayerInfo& info = source.info();
  Arena scratch;
  for (int e = 0; e < info.num_experts; ++e) {
    for (const Projection p : projections) {
      const Memory memory(info.matrix(p));
      source.read(e, p, memory.weight, scratch, scalar_set().decode);
      const auto found = decoded(memory.weight);
      const index_t rows = info.rows(p), cols = info.cols(p);
      index_t wrong = 0;
      for (index_t row = 0; row < rows; ++row)
        for (index_t col = 0; col < cols; ++col)
          wrong += found[static_cast<std::size_t>(row * cols + col)] != to_bf16(value(e, p, row, col));
      CAPTURE(e);
      CAPTURE(name_of(p));
      CHECK(wrong == 0);
      if (!info.mappable) continue;
      const Weight mapped = source.map(e, p);
      CHECK(std::memcmp(mapped.codes, memory.codes.data(), memory.codes.size()) == 0);
      CHECK((memory.scales.empty() ||
             std::memcmp(mapped.scales, memory.scales.data(), memory.scales.size()) == 0));
    }
  }
}

inline void check_info(const LayerSource& source, std::string_view layout, bool mappable, WeightType type) {
  const LayerInfo& info = source.info();
  CHECK(info.num_experts == E);
  CHECK(info.hidden == H);
  CHECK(info.intermediate == I);
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

}  // namespace kt::test
