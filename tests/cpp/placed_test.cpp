// How layers are cut into shards, spread over homes, and laid out in memory on NUMA nodes.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "kernels/registry.h"
#include "weights/experts.h"
#include "weights/layer_memory.h"

using namespace kt;

namespace {

constexpr index_t kHidden = 70;
constexpr int kExperts = 3;

constexpr WeightType kBf16{};
constexpr WeightType kInt8{Format::int8, ScaleType::f32, 1, 128};
constexpr WeightType kInt8Rows{Format::int8, ScaleType::f32};
constexpr WeightType kInt4{Format::int4, ScaleType::bf16, 1, 32};
constexpr WeightType kInt4Zeros{Format::int4, ScaleType::f32, 1, 32, true};
constexpr WeightType kInt4RowZeros{Format::int4, ScaleType::f32, 1, 0, true};
constexpr WeightType kFp8{Format::fp8, ScaleType::f32, 128, 128};
constexpr WeightType kFp8One{Format::fp8, ScaleType::f32, 1 << 20, 0};
constexpr WeightType kMxfp4{Format::mxfp4, ScaleType::e8m0, 1, 32};
constexpr WeightType kNvfp4{Format::nvfp4, ScaleType::e4m3, 1, 16, false, GlobalScale::divides};

std::array<WeightType, 3> all_of(const WeightType& type) { return {type, type, type}; }

std::size_t number(index_t n) { return static_cast<std::size_t>(n); }

// Any bytes for codes and zero points, scales between 1 and 2.
void fill_any(const MutableWeight& w, unsigned seed) {
  const auto byte = [&](index_t i) {
    auto x = (static_cast<unsigned>(i) + seed * 7919u) * 2654435761u;
    return static_cast<std::byte>((x ^ x >> 15) % 127);  // no NaN in any format
  };
  for (index_t i = 0; i < w.codes_bytes(); ++i) w.codes[i] = byte(i);
  for (index_t i = 0; i < w.zeros_bytes(); ++i) w.zeros[i] = byte(i) & std::byte{15};
  for (index_t i = 0; i < w.scale_count(); ++i) {
    const float scale = 1.0f + static_cast<float>(byte(i)) / 256;
    const bf16_t rounded = to_bf16(scale);
    switch (w.type.scale) {
      case ScaleType::f32: std::memcpy(w.scales + 4 * i, &scale, 4); break;
      case ScaleType::bf16: std::memcpy(w.scales + 2 * i, &rounded, 2); break;
      case ScaleType::e8m0: w.scales[i] = static_cast<std::byte>(120 + i % 13); break;
      case ScaleType::e4m3: w.scales[i] = static_cast<std::byte>(0x38 + i % 13); break;
      case ScaleType::none: break;
    }
  }
  constexpr float kGlobalScale = 0.7f;
  if (w.global_scale_bytes() > 0) std::memcpy(w.global_scale, &kGlobalScale, sizeof kGlobalScale);
}

QuantError fill_matrix(const Matrix& m, const MutableWeight& into, const KernelSet&, Arena&) {
  fill_any(into, static_cast<unsigned>(m.expert) * 3 + static_cast<unsigned>(m.projection));
  return {1.0, 2.0};
}

// A layer of any bytes in memory of its own, split among the runtime's shards, or whole, so that they have
// views of it as of a mapped file.
std::shared_ptr<Experts> make(const std::shared_ptr<Runtime>& runtime, const LayerShape& layer, bool split) {
  const Sharding sharding = divide(layer, *runtime, {}), one{Placement::tensor, {{0, layer.intermediate}}};
  const auto memory = std::make_shared<LayerMemory>(*runtime, layer, split ? sharding : one);
  const auto errors = fill_all(*runtime, layer, memory->blocks(), matrices_of(layer), 0, fill_matrix, {});
  for (const QuantError& error : errors) {
    CHECK(error.error == kExperts);
    CHECK(error.norm == 2 * kExperts);
  }
  ExpertWeights weights{layer, sharding, Activation::silu, weights_in(memory->blocks())};
  return std::make_shared<Experts>(runtime, std::move(weights), Storage{memory});
}

std::vector<bf16_t> dequantized(const Experts& experts, Projection p) {
  const ExpertWeights& w = experts.weights();
  std::vector<bf16_t> all(number(w.num_experts * w.rows(p) * w.cols(p)), 0xffff);
  experts.dequantize(p, all.data());
  return all;
}

std::shared_ptr<Runtime> runtime_with(int shards) {
  return std::make_shared<Runtime>(2, shards, std::string("scalar"));
}

}  // namespace

TEST_CASE("cuts fall between blocks that share a scale") {
  CHECK(cut_align(all_of(kBf16), 300) == 32);
  CHECK(cut_align(all_of(kInt8), 300) == 128);
  CHECK(cut_align(all_of(kInt8), 129) == 128);
  CHECK(cut_align(all_of(kInt8), 128) == 32);  // one scale for all columns
  CHECK(cut_align(all_of(kInt8Rows), 300) == 32);
  CHECK(cut_align(all_of(kInt4), 300) == 32);
  CHECK(cut_align(all_of(kFp8), 300) == 128);
  CHECK(cut_align(all_of(kFp8), 100) == 32);
  CHECK(cut_align(all_of(kFp8One), 300) == 32);
  CHECK(cut_align({kBf16, kBf16, {Format::int8, ScaleType::f32, 1, 96}}, 300) == 96);
  CHECK(cut_align({kFp8, kBf16, {Format::int8, ScaleType::f32, 1, 96}}, 1000) == 384);
  CHECK(cut_align({kInt8, kInt8, kBf16}, 300) == 32);  // gate and up are cut between rows
}

TEST_CASE("a layer in shards holds the same bits as one in one piece") {
  for (const WeightType& type :
       {kBf16, kInt8, kInt8Rows, kInt4, kInt4Zeros, kInt4RowZeros, kFp8, kFp8One, kMxfp4, kNvfp4})
    for (const index_t intermediate : {1, 31, 48, 128, 160, 300}) {
      const LayerShape layer{kExperts, kHidden, intermediate, all_of(type)};
      const auto whole_layer = make(runtime_with(1), layer, false);
      for (const int shards : {1, 2, 3, 5, 8, 16}) {
        CAPTURE(name_of(type.format));
        CAPTURE(intermediate);
        CAPTURE(shards);
        const auto runtime = runtime_with(shards);
        const auto split = make(runtime, layer, shards > 1), views = make(runtime, layer, false);
        for (const Projection p : projections) {
          const std::vector<bf16_t> wanted = dequantized(*whole_layer, p);
          CHECK(dequantized(*split, p) == wanted);
          CHECK(dequantized(*views, p) == wanted);
        }
        index_t taken = 0;
        for (std::size_t s = 0; s < number(shards); ++s)
          taken += split->weights().of(Projection::gate, 0, s).rows.size();
        CHECK(taken == intermediate);
      }
    }
}

TEST_CASE("a shard's part is where its slice of the whole is") {
  const LayerShape layer{kExperts, kHidden, 300, all_of(kFp8)};
  const auto runtime = runtime_with(2);
  const auto split = make(runtime, layer, true), views = make(runtime, layer, false);
  const KernelSet kernels = kernel_set("scalar", 0);
  for (const Projection p : projections)
    for (std::size_t s = 0; s < 2; ++s) {
      const WeightBlock a = split->weights().of(p, 1, s), b = views->weights().of(p, 1, s);
      REQUIRE(a.rows.size() == b.rows.size());
      REQUIRE(a.cols.size() == b.cols.size());
      CHECK(a.weight->bytes() < b.weight->bytes());
      std::vector<bf16_t> part(number(a.rows.size() * a.cols.size())), slice(part.size());
      decode(kernels, a, part.data(), a.cols.size());
      decode(kernels, b, slice.data(), b.cols.size());
      CHECK(part == slice);
    }
}

TEST_CASE("shards without a block take no memory") {
  const LayerShape layer{kExperts, kHidden, 48, all_of(kInt4Zeros)};
  const auto runtime = runtime_with(16);
  const LayerMemory memory(*runtime, layer, divide(layer, *runtime, {}));
  REQUIRE(memory.blocks().size() == 16);
  index_t filled = 0, all = 0;
  for (const LayerBlock& block : memory.blocks()) {
    CHECK((block.memory == nullptr) == (block.slice.size() == 0));
    filled += block.slice.size() > 0;
    all += block.slice.size();
  }
  CHECK(filled == 2);
  CHECK(all == 48);
}

TEST_CASE("homes without popularity: neighbours together, by the shards' weights") {
  const std::vector<index_t> even{1, 1}, uneven{3, 1};
  CHECK(assign_homes(4, even, {}) == std::vector{0, 0, 1, 1});
  CHECK(assign_homes(4, uneven, {}) == std::vector{0, 0, 0, 1});
  CHECK(assign_homes(4, even, std::vector(4, 0.0)) == std::vector{0, 0, 1, 1});
  CHECK(assign_homes(1, even, {}).size() == 1);
  CHECK(assign_homes(3, std::vector<index_t>{5}, {}) == std::vector{0, 0, 0});
}

TEST_CASE("homes by popularity: work and memory are both shared out") {
  const std::vector<index_t> even{1, 1};
  CHECK(assign_homes(4, even, std::vector{4.0, 3.0, 2.0, 1.0}) == std::vector{0, 1, 1, 0});
  CHECK(assign_homes(4, even, std::vector{9.0, 0.0, 0.0, 0.0}) == std::vector{0, 1, 1, 0});
  CHECK(assign_homes(3, even, std::vector{10.0, 1.0, 1.0}) == std::vector{0, 1, 1});
  CHECK(assign_homes(1, even, std::vector{1.0}) == std::vector{0});
  const double huge = 1.7e308;  // sums would be infinite
  CHECK(assign_homes(4, even, std::vector{huge, huge, huge, huge}) == std::vector{0, 1, 0, 1});

  const std::vector<index_t> uneven{3, 1};
  std::vector<double> popularity(64);
  for (std::size_t e = 0; e < popularity.size(); ++e) popularity[e] = 1.0 / double(e + 1);
  std::array<double, 2> load{};
  std::array<int, 2> count{};
  const std::vector<int> homes = assign_homes(64, uneven, popularity);
  for (std::size_t e = 0; e < homes.size(); ++e) {
    load[number(homes[e])] += popularity[e];
    ++count[number(homes[e])];
  }
  CHECK(load[0] / load[1] == doctest::Approx(3).epsilon(0.02));
  CHECK(count[0] <= 48);
  CHECK(count[1] <= 16);
}

TEST_CASE("popularity that makes no sense is refused") {
  const std::vector<index_t> even{1, 1};
  const double nan = std::numeric_limits<double>::quiet_NaN(), inf = std::numeric_limits<double>::infinity();
  CHECK_THROWS_WITH_AS(assign_homes(2, even, std::vector{1.0}),
                       "popularity has 1 numbers, wanted 2: one an expert", ValueError);
  CHECK_THROWS_AS(assign_homes(128, std::vector<index_t>{index_t{1} << 62, index_t{1} << 62}, {}),
                  ValueError);
  for (const double bad : {-1.0, nan, inf})
    CHECK_THROWS_AS(assign_homes(2, even, std::vector{1.0, bad}), ValueError);
  CHECK(placement_from("expert") == Placement::expert);
  CHECK_THROWS_AS(placement_from("auto"), ValueError);
}

TEST_CASE("whole experts begin on pages") {
  LayerBlock block = LayerBlock::whole({kExperts, kHidden, 48, all_of(kBf16)});
  CHECK(block.expert_bytes() % 4096 != 0);
  block.on_pages = true;
  CHECK(block.expert_bytes() % 4096 == 0);
}

TEST_CASE("memory that moves keeps its content and its neighbours'") {
  constexpr std::size_t kPage = 4096, kMoved = (3 << 20) + kPage;  // a huge page and parts of two
  const Buffer memory(std::size_t{8} << 20);
  auto* bytes = static_cast<std::byte*>(memory.data());
  const auto expected = [](std::size_t i) { return static_cast<std::byte>(i / 7 % 251); };
  for (std::size_t i = 0; i < memory.size(); ++i) bytes[i] = expected(i);
  const auto is_whole = [&] {
    for (std::size_t i = 0; i < memory.size(); ++i)
      if (bytes[i] != expected(i)) return false;
    return true;
  };
  std::byte* const some = bytes + (1 << 20) + kPage;
  const bool allowed = place_memory(bytes, kPage, std::vector{0});
  CHECK(move_memory(some, kMoved, {}));
  for (int again = 0; again < 3; ++again) CHECK(move_memory(some, kMoved, std::vector{0}) == allowed);
  CHECK(is_whole());
  for (const int node : {63, 5000, -1}) CHECK_FALSE(move_memory(some, kMoved, std::vector{node}));
  CHECK(is_whole());
  some[0] = std::byte{42};
  CHECK(bytes[(1 << 20) + kPage] == std::byte{42});

  const std::vector<const void*> pages{some, some + kMoved - 1};
  if (allowed)
    for (const int node : nodes_of(pages)) CHECK(node <= 0);  // -1: the kernel does not tell
}

TEST_CASE("memory whose nodes are refused is as good") {
  for (const std::size_t bytes : {std::size_t{100}, std::size_t{3} << 20}) {
    const std::vector absent{63};
    Buffer memory(bytes, absent);
    CHECK(memory.refused());
    std::memset(memory.data(), 7, bytes);
    const Buffer moved = std::move(memory);
    CHECK(moved.refused());
    CHECK(static_cast<char*>(moved.data())[bytes - 1] == 7);
  }
  CHECK_FALSE(Buffer(100).refused());
}

TEST_CASE("a sample of pages counts each once, and only those of the shard") {
  const LayerShape layer{kExperts, 256, 300, all_of(kBf16)};
  for (const int shards : {1, 2, 16}) {
    const auto experts = make(runtime_with(shards), layer, shards > 1);
    index_t known = 0, unknown = 0;
    for (const PageNodes& n : experts->page_nodes()) {
      CHECK(n.elsewhere == 0);
      known += n.wanted, unknown += n.unknown;
    }
    const index_t pages = layer.bytes() / 4096;
    CHECK(known + unknown >= pages / 2);
    CHECK(known + unknown <= pages + 2 * shards);
    CHECK((known == 0 || unknown == 0));
  }
  const auto experts = make(runtime_with(1), layer, false);
  const PageNodes n = sample_pages(experts->weights(), 0, std::vector{63});
  CHECK(n.wanted == 0);
}
