// The frozen experts of one layer, wherever they lie: memory of their own, or a mapped file. Immutable.
#pragma once

#include <memory>

#include "moe/layer.h"
#include "weights/layer_plan.h"
#include "weights/placed.h"

namespace kt {

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
