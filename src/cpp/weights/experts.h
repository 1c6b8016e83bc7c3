// The frozen experts of one layer, wherever they lie: memory of their own, or a mapped file. Their numbers
// are immutable. What changes are the homes of experts and the count of their routes: between the runtime's
// calls.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "weights/layer_plan.h"
#include "weights/page_nodes.h"
#include "weights/placed.h"

namespace kt {

class Experts {
 public:
  Experts(std::shared_ptr<Runtime> runtime, const LayerPlan& plan, Activation activation, Placed placed);
  Experts(const Experts&) = delete;
  Experts& operator=(const Experts&) = delete;

  const ExpertWeights& weights() const { return weights_; }
  const LayerPlan& plan() const { return plan_; }
  const Placed& placed() const { return placed_; }
  Runtime& runtime() const { return *runtime_; }

  // These wait for a call in progress.

  // A projection of all experts in bf16, [E, rows, cols]: exactly what the kernels multiply by.
  void dequantize(Projection p, bf16_t* into) const;
  // A shard for each expert; none if they are split.
  std::vector<int> homes() const;
  // New homes by popularity, or without, by the routes so far; memory of the layer's own moves along. False
  // where the kernel refuses that. ValueError for Placement::tensor, and what assign_homes refuses.
  bool rebalance(std::span<const double> popularity);
  // The routes that every forward so far had for each expert.
  std::vector<std::int64_t> routed() const;
  void reset_routed();
  // Where pages of each shard's weights lie, by a sample.
  std::vector<PageNodes> page_nodes() const;

 private:
  std::shared_ptr<Runtime> runtime_;
  LayerPlan plan_;
  Placed placed_;
  std::vector<std::int64_t> routed_;
  ExpertWeights weights_;
};

}  // namespace kt
