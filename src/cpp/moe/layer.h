// One MoE layer as data: the frozen experts, the inputs of a call, and what forward and backward write.
// Shapes: T tokens, K slots a token, E experts, H hidden, I intermediate, r rank; README.md has the
// mathematics.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "base/projection.h"
#include "base/split.h"
#include "base/view.h"
#include "base/weight.h"
#include "gemm/decode.h"
#include "kernels/kernel_set.h"
#include "moe/runtime.h"

namespace kt {

// ValueError for a name that is not known.
Activation activation_from(std::string_view name);
std::string_view name_of(Activation activation);
const ActivationKernels& kernels_of(const KernelSet& kernels, Activation activation);

// How experts are spread over shards: a slice of each to every shard; or each whole to one shard, its home,
// where it is computed.
enum class Placement : std::uint8_t { tensor, expert };

// E matrices of one shape, one behind the other.
struct Stack {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  index_t rows = 0, cols = 0;

  MatView operator[](int expert) const {
    return view(static_cast<const char*>(data) + expert * bytes(), dtype, rows, cols);
  }
  index_t bytes() const { return rows * cols * static_cast<index_t>(size_of(dtype)); }  // of one matrix
};

struct ExpertWeights {
  int num_experts = 0;
  index_t hidden = 0, intermediate = 0;
  Activation activation = Activation::silu;
  // gate, up [I, H]; down [H, I]: one an expert; or if they are `split`, a shard's part of each, [shard * E +
  // expert].
  std::array<std::vector<Weight>, 3> weights;
  // Asks for an expert's weights ahead of their use, where they may not be in memory; else empty.
  std::function<void(int expert)> fetch;
  std::array<const bf16_t*, 3> biases{};  // [E, rows of the projection], or null: it has none
  std::vector<Range> shards = {};  // of the intermediate dimension; some may be empty. None: one, all of it
  bool split = false;
  Placement placement = Placement::tensor;
  std::vector<int> homes = {};     // a shard for each expert, unless the placement is `tensor`
  std::int64_t* routed = nullptr;  // [E], null or what every forward adds its routes to

  // A projection of an expert, a shard's part of it.
  WeightBlock of(Projection p, int expert, std::size_t shard) const {
    const auto& all = weights[index_of(p)];
    const auto e = static_cast<std::size_t>(expert);
    if (split) return whole(all[shard * static_cast<std::size_t>(num_experts) + e]);
    const Weight& w = all[e];
    return p == Projection::down ? WeightBlock{&w, {0, w.rows}, shards[shard]}
                                 : WeightBlock{&w, shards[shard], {0, w.cols}};
  }
  // All of it. Not if they are split.
  const Weight& of(Projection p, int expert) const {
    return weights[index_of(p)][static_cast<std::size_t>(expert)];
  }
  const bf16_t* bias(Projection p, int expert) const {
    const bf16_t* all = biases[index_of(p)];
    return all == nullptr ? nullptr : all + expert * rows(p);
  }
  index_t rows(Projection p) const { return p == Projection::down ? hidden : intermediate; }
  index_t cols(Projection p) const { return p == Projection::down ? intermediate : hidden; }
};

// LoRA of one projection: a [r, in], b [out, r] for each expert, fp32 or bf16. Rank 0: the projection has
// none.
struct LoraPair {
  Stack a, b;
  float scaling = 1.0f;

  index_t rank() const { return a.rows; }
  explicit operator bool() const { return rank() > 0; }
};

// Of the input of LoRA A, drawn anew by every seed.
struct Dropout {
  // Of dropping, in [0, 1). Kept elements are scaled by 1 / (1 - probability), through the LoRA scaling. A
  // double, because a float just below 1 may be 1.
  double probability = 0.0;
  std::uint64_t seed = 0;

  bool active() const { return probability > 0.0; }
};

struct LayerInputs {
  MatView hidden_states;  // [T, H] bf16
  MatView topk_ids;       // [T, K] int32 or int64
  MatView topk_weights;   // [T, K] fp32
  std::array<LoraPair, 3> lora;
  Dropout dropout;

  const LoraPair& of(Projection p) const { return lora[index_of(p)]; }
};

// What backward needs of forward, by route and rounded to bf16: G and U [routes, I], a shard's columns of all
// routes before the next one's; and P of each projection, r numbers a route (that of down times the routing
// weight).
struct Saved {
  bf16_t *gate = nullptr, *up = nullptr;
  std::array<bf16_t*, 3> low_rank{};

  explicit operator bool() const { return gate != nullptr; }
};

// A matrix to be written, bf16 or fp32, dense.
struct Result {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::bf16;

  explicit operator bool() const { return data != nullptr; }
};

struct LayerGradients {
  Result hidden_states;                  // [T, H]
  float* topk_weights = nullptr;         // [T, K], or null
  std::array<Result, 3> lora_a, lora_b;  // [E, r, in], [E, out, r]
  bool clear_idle = true;  // LoRA gradients of experts without routes become zero; false: stay as they are
};

// out [T, H]. `saved` may be null pointers: nothing is kept.
void forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
             Result out);

// Gradients of sum(grad_out * out), grad_out [T, H] bf16. With `saved` null pointers it is computed again.
void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
              const MatView& grad_out, const LayerGradients& gradients);

}  // namespace kt
