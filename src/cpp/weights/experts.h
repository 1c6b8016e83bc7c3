// The frozen experts of one layer, wherever they lie: memory of their own, or a mapped file. Immutable.
#pragma once

#include <array>
#include <memory>

#include "moe/layer.h"
#include "weights/layer_plan.h"
#include "weights/quantize.h"

namespace kt {

// The weights of a layer, and what keeps them there.
struct Placed {
  std::shared_ptr<const void> memory;
  std::array<std::vector<Weight>, 3> weights;    // gate, up, down; one an expert
  std::array<std::vector<bf16_t>, 3> biases;     // of gate, up, down; empty: none
  std::function<void(int expert)> fetch;         // see ExpertWeights
  std::function<bool(Runtime& runtime)> verify;  // of a packed file: reads all of it
  bool mapped = false;                           // paged in from a file by access
  bool quantized = false;                        // when they were loaded, with these errors
  std::array<QuantError, 3> errors{};            // of gate, up, down
};

class Experts {
 public:
  Experts(std::shared_ptr<Runtime> runtime, const LayerPlan& plan, Activation activation, Placed placed);

  const ExpertWeights& weights() const { return weights_; }
  const LayerPlan& plan() const { return plan_; }
  const Placed& placed() const { return placed_; }
  Runtime& runtime() const { return *runtime_; }

  // A projection of all experts in bf16, [E, rows, cols]: exactly what the kernels multiply by.
  void dequantize(Projection p, bf16_t* into) const;

 private:
  std::shared_ptr<Runtime> runtime_;
  LayerPlan plan_;
  Placed placed_;
  ExpertWeights weights_;
};

}  // namespace kt
