// One MoE layer as data: the frozen experts, the inputs of a call, and what forward and backward write.
// Shapes: T tokens, K slots a token, E experts, H hidden, I intermediate, r rank; README.md has the
// mathematics.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <string_view>
#include <vector>

#include "base/view.h"
#include "base/weight.h"
#include "gemm/decode.h"
#include "kernels/kernel_set.h"
#include "moe/runtime.h"

namespace kt {

inline const ActivationKernels& kernels_of(const KernelSet& kernels, Activation activation, bool gated) {
  const ActivationTable& table = *kernels.epilogue.activations;
  return (gated ? table.gated : table.ungated)[to_size(activation)];
}

// How experts are divided among shards. `tensor` (tensor parallel): every shard has a slice of each expert's
// intermediate dimension. `expert` (expert parallel): a shard has whole experts, and computes them alone.
enum class Placement : std::uint8_t { tensor, expert };

// E matrices of one shape, one behind the other: [E, rows, cols].
struct StridedBatch {
  const void* data = nullptr;
  DType dtype = DType::bf16;
  index_t rows = 0, cols = 0;

  MatView operator[](int expert) const {
    return view(static_cast<const char*>(data) + expert * bytes(), dtype, rows, cols);
  }
  index_t bytes() const { return rows * cols * static_cast<index_t>(size_of(dtype)); }  // of one matrix
};

// How the experts of a layer are divided among the shards of the runtime that computes them.
struct Sharding {
  Placement placement = Placement::tensor;
  std::vector<Range> shards = {};  // their slices of I, some may be empty
  std::vector<int> homes = {};     // the shard that has each expert, if the placement is `expert`
};

// The frozen experts of a layer: their shapes and formats, their division, and where each matrix lies.
struct ExpertWeights : LayerShape, Sharding {
  Activation activation = Activation::silu;
  // gate, up [I, H] and down [H, I] of each expert. If they are split, the slice that a shard has of each is
  // at [shard * E + expert].
  std::array<std::vector<Weight>, 3> weights = {};
  // Asks for an expert's weights before they are used; empty where they are in memory anyhow.
  std::function<void(int expert)> fetch = {};
  std::array<const bf16_t*, 3> biases = {};  // [E, rows of the projection]; null: there is none
  std::int64_t* routed = nullptr;            // [E], to which every forward adds its routes; or null

  bool split() const { return std::ssize(weights[index_of(Projection::down)]) > num_experts; }
  // The slice of an expert's projection that a shard has.
  WeightBlock of(Projection p, int expert, std::size_t shard) const {
    const auto& all = weights[index_of(p)];
    const auto e = to_size(expert);
    if (split()) return whole(all[shard * to_size(num_experts) + e]);
    const Weight& w = all[e];
    return p == Projection::down ? WeightBlock{&w, {0, w.rows}, shards[shard]}
                                 : WeightBlock{&w, shards[shard], {0, w.cols}};
  }
  // An expert's projection, of weights that are not split.
  const Weight& of(Projection p, int expert) const { return weights[index_of(p)][to_size(expert)]; }
  const bf16_t* bias(Projection p, int expert) const {
    const bf16_t* all = biases[index_of(p)];
    return all == nullptr ? nullptr : all + expert * rows(p);
  }
};

// LoRA of one projection: a [r, in], b [out, r] for each expert, fp32 or bf16. A projection without LoRA has
// rank 0.
struct LoraPair {
  StridedBatch a, b;
  float scaling = 1.0f;

  index_t rank() const { return a.rows; }
  explicit operator bool() const { return rank() > 0; }
};

// Dropout of the input of LoRA A. The seed decides which elements are dropped.
struct Dropout {
  // An element is dropped with this probability, in [0, 1). The others are scaled by 1 / (1 - probability),
  // through the LoRA scaling. It is a double, because a float just below 1 may be 1.
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

// What backward needs of forward, by routed token and rounded to bf16: G and U [routes, I], where a shard's
// columns of all routed tokens come before the next one's; and P' of each projection, r numbers a routed
// token, [r, m] token block by token block (that of down times the routing weight).
struct Saved {
  bf16_t *gate = nullptr, *up = nullptr;
  std::array<bf16_t*, 3> p{};

  explicit operator bool() const { return up != nullptr; }  // there may be no gate
};

// A dense matrix that is to be written, bf16 or fp32.
struct Result {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::bf16;

  explicit operator bool() const { return data != nullptr; }
};

struct LayerGradients {
  Result hidden_states;                  // [T, H]
  float* topk_weights = nullptr;         // [T, K], or null
  std::array<Result, 3> lora_a, lora_b;  // [E, r, in], [E, out, r]
  bool clear_idle = true;  // LoRA gradients of experts without tokens become zero; else they stay as they are
};

// Writes out [T, H]. Where `saved` has null pointers, nothing is kept for backward.
void forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
             Result out);

// Writes the gradients of sum(grad_out * out), grad_out [T, H] bf16. What `saved` lacks is computed again.
void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
              const MatView& grad_out, const LayerGradients& gradients);

}  // namespace kt
