// forward and backward of small layers: the same bits for any number of threads, and close to the scalar set.
#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/processor.h"
#include "cpu/sysfs.h"
#include "kernels/registry.h"
#include "moe/layer.h"
#include "moe/plan.h"

using namespace kt;

namespace {

enum class To { any, one, most_idle, none, sparse };  // which experts the tokens go to

struct Shape {
  const char* name;
  index_t tokens, slots;
  int experts;
  index_t hidden, intermediate;
  To to = To::any;
  std::array<index_t, 3> ranks{16, 16, 16};
};

struct Options {
  bool save = true;
  double dropout = 0.0;
  DType result = DType::f32, lora = DType::f32;
  WeightType weights = {};
  Activation activation = Activation::silu;
  std::array<bool, 3> biases = {};
  bool gated = true;
};

// Beyond the limits of gpt-oss's activation.
constexpr float kLargeBias = 5.0f;

constexpr WeightType kInt8{Format::int8, ScaleType::f32};
constexpr WeightType kInt4{Format::int4, ScaleType::bf16, 1, 32};
constexpr WeightType kInt4Zeros{Format::int4, ScaleType::f32, 1, 64, true};
constexpr WeightType kFp8{Format::fp8, ScaleType::f32, 128, 128};
constexpr WeightType kMxfp4{Format::mxfp4, ScaleType::e8m0, 1, 32};
constexpr WeightType kNvfp4{Format::nvfp4, ScaleType::e4m3, 1, 16, false, GlobalScale::divides};

// A vector whose end is the end of its memory, for the address sanitizer.
using Bytes = std::vector<unsigned char>;

class Layer {
 public:
  Layer(const Shape& shape, const Options& options) : shape_(shape), options_(options) {
    const auto [name, t, k, e, h, n, to, ranks] = shape;
    const float to_hidden = 1.0f / std::sqrt(float(h)), to_inner = 1.0f / std::sqrt(float(n));
    experts_ = {LayerShape{e, h, n, {}, options.gated}, {}, options.activation};
    for (const Projection p : projections_of(options.gated)) {
      add_weights(p, p == Projection::down ? to_inner : to_hidden);
      if (options.biases[index_of(p)])
        experts_.biases[index_of(p)] =
            static_cast<const bf16_t*>(numbers(e * experts_.rows(p), kLargeBias, DType::bf16));
    }
    inputs_.hidden_states = view(numbers(t * h, 1.0f, DType::bf16), DType::bf16, t, h);
    grad_out_ = view(numbers(t * h, 1.0f, DType::bf16), DType::bf16, t, h);
    for (index_t i = 0; i < t * k; ++i) ids_.push_back(pick(i));
    inputs_.topk_ids = view(ids_.data(), DType::i32, t, k);
    inputs_.topk_weights = view(numbers(t * k, 0.5f, DType::f32), DType::f32, t, k);
    inputs_.dropout = {options.dropout, 17};
    for (const Projection p : projections_of(options.gated)) {
      const index_t r = ranks[index_of(p)], in = p == Projection::down ? n : h, out = h + n - in;
      if (r == 0) continue;
      inputs_.lora[index_of(p)] = {stack(e, r, in, 1.0f / std::sqrt(float(in)), options.lora),
                                   stack(e, out, r, 1.0f / std::sqrt(float(r)), options.lora), 0.7f};
    }
  }

  // The intermediate dimension cut among the shards of a runtime; or with `homes`, whole experts on them.
  void cut(const Runtime& runtime, bool homes = false) {
    const WeightType& type = options_.weights;
    const auto below = [&](index_t n) { return n < shape_.intermediate ? n : index_t{1}; };
    const index_t align = std::max({index_t{2}, below(type.scale_rows), below(type.scale_cols)});
    experts_.shards = runtime.split(shape_.intermediate, type.format == Format::bf16 ? 1 : align);
    experts_.placement = homes ? Placement::expert : Placement::tensor;
    for (int e = 0; homes && e < shape_.experts; ++e) experts_.homes.push_back(e * 7 % runtime.shards());
  }

  // Every result: out, and the gradients of the hidden states, the routing weights and LoRA's tensors.
  // Memory starts as NaN, so that what is not written shows.
  std::map<std::string, Bytes> run(Runtime& runtime) const {
    std::map<std::string, Bytes> results;
    const auto result = [&](const std::string& name, index_t n, DType type) -> void* {
      Bytes& bytes = results[name];
      bytes.assign(static_cast<std::size_t>(n) * size_of(type), 0xff);
      return bytes.data();
    };
    const auto [name, t, k, e, h, n, to, ranks] = shape_;
    const index_t routes = count_routes(inputs_.topk_ids, e);
    index_t width = std::ssize(x_projections_of(options_.gated)) * n;
    for (const LoraPair& lora : inputs_.lora) width += lora.rank();
    std::vector<bf16_t> kept(static_cast<std::size_t>(routes * width));
    Saved saved;
    if (options_.save && routes > 0) {
      bf16_t* next = kept.data();
      if (options_.gated) saved.gate = std::exchange(next, next + routes * n);
      saved.up = std::exchange(next, next + routes * n);
      for (const Projection p : projections)
        saved.p[index_of(p)] = std::exchange(next, next + routes * inputs_.of(p).rank());
    }
    forward(runtime, experts_, inputs_, saved, {result("out", t * h, options_.result), options_.result});

    LayerGradients gradients;
    gradients.hidden_states = {result("hidden_states", t * h, options_.result), options_.result};
    gradients.topk_weights = static_cast<float*>(result("topk_weights", t * k, DType::f32));
    for (const Projection p : projections) {
      const LoraPair& lora = inputs_.of(p);
      if (!lora) continue;
      const std::string of = std::string(name_of(p));
      gradients.lora_a[index_of(p)] = {result(of + "_a", e * lora.a.rows * lora.a.cols, options_.lora),
                                       options_.lora};
      gradients.lora_b[index_of(p)] = {result(of + "_b", e * lora.b.rows * lora.b.cols, options_.lora),
                                       options_.lora};
    }
    backward(runtime, experts_, inputs_, saved, grad_out_, gradients);
    return results;
  }

  // The same with every weight decoded by itself, in the obvious way.
  void dequantize() {
    const DecodeKernels decode = kernel_set("scalar", 0).decode;
    for (auto& stack : experts_.weights)
      for (Weight& w : stack) {
        auto* decoded = reinterpret_cast<bf16_t*>(
            memory_.emplace_back(static_cast<std::size_t>(2 * w.rows * w.cols)).data());
        const index_t groups = ceil_div(w.cols, w.group());
        float global_scale = 1;
        if (w.global_scale != nullptr) std::memcpy(&global_scale, w.global_scale, sizeof global_scale);
        for (index_t row = 0; row < w.rows; ++row)
          for (index_t group = 0; group < groups; ++group) {
            const index_t first = group * w.group(), scale = row / w.type.scale_rows * groups + group;
            const CodedRows source{1,
                                   static_cast<int>(std::min(w.group(), w.cols - first)),
                                   reinterpret_cast<const std::uint8_t*>(w.codes) +
                                       row * w.code_bytes(w.cols) + w.code_bytes(first),
                                   0,
                                   w.type.scale,
                                   w.scales + scale * size_of(w.type.scale),
                                   0,
                                   w.zeros ? reinterpret_cast<const std::uint8_t*>(w.zeros) + scale : nullptr,
                                   static_cast<int>(w.group()),
                                   global_scale,
                                   w.type.global_scale == GlobalScale::divides};
            decode.from_codes[static_cast<int>(traits_of(w.type.format).codes)](
                source, decoded + row * w.cols + first, 0);
          }
        w = {{}, w.rows, w.cols, reinterpret_cast<const std::byte*>(decoded)};
      }
  }

  // out and the gradient of the routing weights of a layer like gpt-oss's, or without a gate like
  // Nemotron-H's, without LoRA, in double.
  std::array<std::vector<float>, 2> by_definition() const {
    const auto [name, t, k, e, h, n, to, ranks] = shape_;
    const auto at = [](const void* data, index_t i) {
      return static_cast<double>(to_float(static_cast<const bf16_t*>(data)[i]));
    };
    const auto project = [&](Projection p, int expert, const std::vector<double>& x) {
      std::vector<double> y;
      for (index_t row = 0; row < experts_.rows(p); ++row) {
        y.push_back(experts_.bias(p, expert) == nullptr ? 0.0 : at(experts_.bias(p, expert), row));
        for (index_t i = 0; i < std::ssize(x); ++i)
          y.back() +=
              at(experts_.of(p, expert).codes, row * std::ssize(x) + i) * x[static_cast<std::size_t>(i)];
      }
      return y;
    };
    std::vector<float> out(static_cast<std::size_t>(t * h)), grad;
    for (index_t route = 0; route < t * k; ++route) {
      const index_t first = route / k * h;
      const int expert = ids_[static_cast<std::size_t>(route)];
      std::vector<double> x;
      for (index_t i = 0; i < h; ++i) x.push_back(at(inputs_.hidden_states.data, first + i));
      std::vector<double> g, u = project(Projection::up, expert, x);
      if (options_.gated) g = project(Projection::gate, expert, x);
      for (std::size_t i = 0; i < u.size(); ++i) {
        if (options_.gated) {
          const double gate = std::min(g[i], 7.0), up = std::clamp(u[i], -7.0, 7.0);
          u[i] = (up + 1) * gate / (1 + std::exp(-1.702 * gate));
        } else {
          u[i] = u[i] > 0 ? u[i] * u[i] : 0;
        }
      }
      const std::vector<double> y = project(Projection::down, expert, u);
      const float weight = static_cast<const float*>(inputs_.topk_weights.data)[route];
      double dot = 0;
      for (index_t i = 0; i < h; ++i) {
        const double value = y[static_cast<std::size_t>(i)];
        out[static_cast<std::size_t>(first + i)] += static_cast<float>(weight * value);
        dot += value * at(grad_out_.data, first + i);
      }
      grad.push_back(static_cast<float>(dot));
    }
    return {out, grad};
  }

  DType type_of(const std::string& result) const {
    if (result == "topk_weights") return DType::f32;
    return result == "out" || result == "hidden_states" ? options_.result : options_.lora;
  }

 private:
  int pick(index_t i) {
    const int e = shape_.experts;
    switch (shape_.to) {
      case To::any: return static_cast<int>(random_() % static_cast<unsigned>(e));
      case To::one: return e - 1;
      case To::most_idle: return i % 3 == 0 ? 1 : e - 2;
      case To::none: return e;
      case To::sparse: return static_cast<int>(random_() % static_cast<unsigned>(e + 1));
    }
    return e;
  }

  const void* numbers(index_t n, float scale, DType type) {
    std::normal_distribution<float> normal;
    Bytes& bytes = memory_.emplace_back(static_cast<std::size_t>(n) * size_of(type));
    for (index_t i = 0; i < n; ++i) {
      const float x = scale * normal(random_);
      if (type == DType::f32)
        reinterpret_cast<float*>(bytes.data())[i] = x;
      else
        reinterpret_cast<bf16_t*>(bytes.data())[i] = to_bf16(x);
    }
    return bytes.data();
  }
  // Random codes of about the wanted size, every one of a format's but NaN.
  void add_weights(Projection p, float size) {
    std::uniform_int_distribution<int> byte(0, 255), zero(6, 9);
    for (int e = 0; e < shape_.experts; ++e) {
      Weight w{options_.weights, experts_.rows(p), experts_.cols(p)};
      if (w.type.format == Format::bf16) {
        w.codes = static_cast<const std::byte*>(numbers(w.rows * w.cols, size, DType::bf16));
      } else {
        w.codes = fill(w.codes_bytes(),
                       [&] { return byte(random_) & (w.type.format == Format::fp8 ? 0xbb : 0xff); });
        if (w.type.zero_points) w.zeros = fill(w.zeros_bytes(), [&] { return zero(random_); });
        w.scales = scales(w, size);
        if (w.global_scale_bytes() > 0) {
          const float global_scale = 5 / size;
          Bytes& bytes = memory_.emplace_back(sizeof global_scale);
          std::memcpy(bytes.data(), &global_scale, sizeof global_scale);
          w.global_scale = reinterpret_cast<const std::byte*>(bytes.data());
        }
      }
      experts_.weights[index_of(p)].push_back(w);
    }
  }
  template <class Draw>
  const std::byte* fill(index_t n, const Draw& draw) {
    Bytes& bytes = memory_.emplace_back(static_cast<std::size_t>(n));
    for (auto& b : bytes) b = static_cast<unsigned char>(draw());
    return reinterpret_cast<const std::byte*>(bytes.data());
  }
  const std::byte* scales(const Weight& w, float size) {
    const auto n = w.scale_count();
    if (w.type.scale == ScaleType::e8m0) return fill(n, [&] { return 122 + random_() % 3; });
    if (w.type.scale == ScaleType::e4m3) return fill(n, [&] { return 0x38 + random_() % 16; });
    const float usual = w.type.format == Format::int8 ? 0.01f : 0.2f;
    const bool narrow = w.type.scale == ScaleType::bf16;
    return static_cast<const std::byte*>(numbers(n, usual * size, narrow ? DType::bf16 : DType::f32));
  }
  StridedBatch stack(index_t count, index_t rows, index_t cols, float scale, DType type = DType::bf16) {
    return {numbers(count * rows * cols, scale, type), type, rows, cols};
  }

  Shape shape_;
  Options options_;
  std::mt19937 random_{5};
  std::vector<Bytes> memory_;
  std::vector<std::int32_t> ids_;
  ExpertWeights experts_;
  LayerInputs inputs_;
  MatView grad_out_;
};

// So many nodes alike, each with one of the CPUs there are.
Topology machine(int nodes) {
  Topology t;
  const std::vector<int> cpus = affinity();
  t.nodes.clear();
  for (int n = 0; n < nodes; ++n) {
    const int cpu = cpus[static_cast<std::size_t>(n) % cpus.size()];
    t.nodes.push_back({n, {cpu}, {cpu}, std::vector<int>(static_cast<std::size_t>(nodes), 10), 1, 1});
  }
  return t;
}

// Made once: starting threads takes longer than these layers.
Runtime& runtime_of(std::string_view isa, int threads, int shards = 1, int nodes = 1) {
  static std::map<std::tuple<std::string, int, int, int>, Runtime> runtimes;
  const std::tuple key(std::string(isa), threads, shards, nodes);
  return runtimes.try_emplace(key, threads, shards, std::string(isa), machine(nodes)).first->second;
}

std::vector<float> floats(const Bytes& bytes, DType type) {
  std::vector<float> result(bytes.size() / size_of(type));
  for (std::size_t i = 0; i < result.size(); ++i)
    result[i] = type == DType::f32 ? reinterpret_cast<const float*>(bytes.data())[i]
                                   : to_float(reinterpret_cast<const bf16_t*>(bytes.data())[i]);
  return result;
}

// |a - b| / |b|; NaN where there is one.
double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double error = 0, size = 0;
  for (std::size_t i = 0; i < a.size(); ++i) error += std::pow(a[i] - b[i], 2), size += std::pow(b[i], 2);
  return std::isnan(error) ? error : std::sqrt(error) / std::max(std::sqrt(size), 1e-30);
}

// Flipped roundings of bf16, 2^-8 of an element, do not average out in results of a few elements.
constexpr double kClose = 0.008;

void check(const Shape& shape, const Options& options, std::initializer_list<int> threads = {2, 5, 16}) {
  CAPTURE(std::string(shape.name));
  CAPTURE(options.save);
  const Layer layer(shape, options);
  const auto scalar = layer.run(runtime_of("scalar", 1));
  for (const KernelEntry& entry : kernel_registry()) {
    if (availability(entry, cpu_features()) != "available") continue;
    CAPTURE(std::string(entry.name));
    const auto expected = layer.run(runtime_of(entry.name, 1));
    for (const auto& [name, bytes] : expected) {
      CAPTURE(name);
      CHECK(difference(floats(bytes, layer.type_of(name)), floats(scalar.at(name), layer.type_of(name))) <=
            kClose);
    }
    for (const int count : threads) {
      CAPTURE(count);
      const auto results = layer.run(runtime_of(entry.name, count));
      for (const auto& [name, bytes] : results) {
        CAPTURE(name);
        CHECK(bytes == expected.at(name));
      }
    }
  }
}

const Shape kShapes[] = {
    {"usual", 70, 3, 5, 72, 56},
    {"one token", 1, 2, 4, 40, 640},  // whose few rows are cut by the number of threads
    {"few rows of a wide layer", 6, 2, 3, 600, 530},
    {"several blocks of one expert", 2700, 1, 2, 20, 24, To::one},
    {"more blocks than inputs are kept", 500, 1, 25, 24, 40},
    {"more slices than sums are kept", 33, 2, 3, 1290, 17},
    {"idle experts", 50, 2, 9, 33, 31, To::most_idle},
    {"routes missing", 40, 4, 3, 24, 70, To::sparse, {5, 5, 5}},
    {"no routes", 5, 2, 3, 16, 24, To::none},
    {"no tokens", 0, 2, 3, 16, 24},
    {"odd sizes", 19, 1, 1, 1, 1, To::one, {1, 1, 1}},
    {"no LoRA", 45, 2, 3, 40, 33, To::any, {0, 0, 0}},
    {"LoRA of gate alone", 45, 2, 3, 40, 33, To::any, {40, 0, 0}},
    {"LoRA of up and down", 45, 2, 3, 40, 33, To::any, {0, 1, 40}},
    {"LoRA of down alone", 3, 2, 3, 40, 33, To::any, {0, 0, 16}},
};

}  // namespace

TEST_CASE("the same bits for any number of threads, close to the scalar set") {
  alarm(600);  // a hang ends the test
  for (const Shape& shape : kShapes)
    for (const bool save : {true, false}) {
      check(shape, {save});
      check(shape, {save, 0.3, DType::bf16, DType::bf16});
    }
}

TEST_CASE(
    "quantised weights: the bits of any number of threads, close to the scalar set and to bf16 weights") {
  for (const WeightType& type : {kInt8, kInt4, kInt4Zeros, kFp8, kMxfp4, kNvfp4}) {
    CAPTURE(std::string(name_of(type.format)));
    for (const Shape& shape : kShapes) {
      CAPTURE(std::string(shape.name));
      const Options options{true, 0.0, DType::f32, DType::f32, type};
      check(shape, options, {5});
      Layer layer(shape, options);
      Runtime& runtime = runtime_of("scalar", 1);
      const auto results = layer.run(runtime);
      layer.dequantize();
      for (const auto& [name, bytes] : layer.run(runtime)) {
        CAPTURE(name);
        // Few rows going backward are summed in another order.
        CHECK(difference(floats(results.at(name), layer.type_of(name)), floats(bytes, layer.type_of(name))) <=
              1e-3);
      }
    }
  }
}

TEST_CASE("biases and other activations: the bits of any number of threads, close to the scalar set") {
  for (int a = 0; a < kActivationCount; ++a)
    for (const std::array<bool, 3>& biases : {std::array{true, true, true}, {false, true, false}, {}}) {
      const auto activation = static_cast<Activation>(a);
      CAPTURE(std::string(name_of(activation)));
      CAPTURE(biases[0]);
      Options options{.activation = activation, .biases = biases};
      for (const Shape& shape : kShapes)
        for (const bool save : {true, false}) {
          options.save = save;
          check(shape, options, {5});
        }
      options = {true, 0.3, DType::bf16, DType::bf16, kMxfp4, activation, biases};
      for (const Shape& shape : kShapes) check(shape, options, {16});
    }
}

TEST_CASE("without a gate: the bits of any number of threads, close to the scalar set") {
  for (const Shape& shape : kShapes) {
    check(shape, {.activation = Activation::relu2, .gated = false});
    check(shape,
          {.save = false, .activation = Activation::gelu, .biases = {false, true, true}, .gated = false},
          {5});
    check(shape,
          {true, 0.3, DType::bf16, DType::bf16, kInt4, Activation::clamped_silu, {false, true, false}, false},
          {16});
  }
}

TEST_CASE("shards on nodes: the bits of any number of threads, close to one shard's") {
  alarm(600);
  for (const KernelEntry& entry : kernel_registry()) {
    if (availability(entry, cpu_features()) != "available") continue;
    CAPTURE(std::string(entry.name));
    for (const Shape& shape : kShapes)
      for (const int shards : {2, 3, 5, 16})
        for (const Options& options :
             {Options{},
              Options{false, 0.3, DType::bf16, DType::bf16, kInt4, Activation::gpt_oss, {true, true, true}},
              Options{.weights = kFp8, .biases = {false, true, true}},
              Options{.weights = kInt8, .activation = Activation::relu2, .gated = false}}) {
          CAPTURE(std::string(shape.name));
          CAPTURE(shards);
          CAPTURE(options.save);
          const Layer one(shape, options);
          const auto whole = one.run(runtime_of(entry.name, 1));
          for (const int nodes : {1, 3, 4}) {
            CAPTURE(nodes);
            Layer layer(shape, options);
            layer.cut(runtime_of(entry.name, 1, shards, nodes));
            const auto expected = layer.run(runtime_of(entry.name, 1, shards, nodes));
            for (const auto& [name, bytes] : expected) {
              CAPTURE(name);
              const DType type = layer.type_of(name);
              CHECK(difference(floats(bytes, type), floats(whole.at(name), type)) <= kClose);
            }
            for (const int threads : {2, 7}) {
              CAPTURE(threads);
              CHECK(layer.run(runtime_of(entry.name, threads, shards, nodes)) == expected);
            }
          }
        }
  }
}

TEST_CASE("whole experts on shards: bit for bit what one shard computes") {
  for (const Shape& shape : kShapes)
    for (const Options& options : {Options{}, Options{false, 0.3, DType::bf16, DType::bf16, kInt8},
                                   Options{.activation = Activation::relu2, .gated = false}})
      for (const auto& [threads, shards, nodes] : {std::tuple{1, 3, 1}, {5, 4, 1}, {7, 4, 4}, {3, 16, 2}}) {
        CAPTURE(std::string(shape.name));
        CAPTURE(shards);
        const std::string isa(best_isa(cpu_features()));
        const auto expected = Layer(shape, options).run(runtime_of(isa, 1));
        Layer layer(shape, options);
        layer.cut(runtime_of(isa, threads, shards, nodes), /*homes=*/true);
        CHECK(layer.run(runtime_of(isa, threads, shards, nodes)) == expected);
      }
}

TEST_CASE("layers like gpt-oss's and Nemotron-H's against their definitions") {
  const Shape shape{"", 70, 2, 3, 40, 33, To::any, {0, 0, 0}};
  Runtime& runtime = runtime_of("scalar", 1);
  for (const Options& options : {Options{.activation = Activation::gpt_oss, .biases = {true, true, true}},
                                 Options{.activation = Activation::relu2, .gated = false}}) {
    CAPTURE(options.gated);
    const Layer layer(shape, options);
    const auto results = layer.run(runtime);
    const auto [out, grad] = layer.by_definition();
    CHECK(difference(floats(results.at("out"), DType::f32), out) <= kClose);
    CHECK(difference(floats(results.at("topk_weights"), DType::f32), grad) <= kClose);
  }
}

TEST_CASE("every number of rows that is few, a half tile, or a tail") {
  for (const Options& options :
       {Options{}, Options{.activation = Activation::gpt_oss, .biases = {true, true, true}},
        Options{.activation = Activation::relu2, .gated = false}})
    for (index_t rows = 1; rows <= 70; ++rows)
      check({"rows", rows, 1, 1, 34, 50, To::one, {3, 2, 1}}, options, {5});
}

TEST_CASE("many calls with more threads than cores") {
  for (const Shape& shape : {kShapes[0], kShapes[4], kShapes[7]})
    for (const bool save : {true, false}) {
      const Layer layer(shape, {save});
      const auto expected = layer.run(runtime_of(best_isa(cpu_features()), 1));
      for (int i = 0; i < 60; ++i) CHECK(layer.run(runtime_of(best_isa(cpu_features()), 16)) == expected);
    }
}

TEST_CASE("callers of one runtime take turns") {
  const Layer layer(kShapes[0], {});
  const auto expected = layer.run(runtime_of("scalar", 5));
  std::vector<int> wrong(4);
  std::vector<std::thread> callers;
  for (int& mine : wrong)
    callers.emplace_back([&] {
      for (int i = 0; i < 10; ++i) mine += layer.run(runtime_of("scalar", 5)) != expected;
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(wrong == std::vector<int>(4));
}
