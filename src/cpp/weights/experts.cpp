#include "weights/experts.h"

#include <algorithm>

#include "gemm/decode.h"

namespace kt {

namespace {

std::array<const bf16_t*, 3> biases_of(const Placed& placed) {
  std::array<const bf16_t*, 3> biases{};
  for (const Projection p : projections)
    if (const auto& own = placed.biases[index_of(p)]; !own.empty()) biases[index_of(p)] = own.data();
  return biases;
}

}  // namespace

Experts::Experts(std::shared_ptr<Runtime> runtime, const LayerPlan& plan, Activation activation,
                 Placed placed)
    : runtime_(std::move(runtime)),
      plan_(plan),
      placed_(std::move(placed)),
      weights_{plan.num_experts, plan.hidden,   plan.intermediate, activation,
               placed_.weights,  placed_.fetch, biases_of(placed_)} {
  // Cuts on multiples of what shares a scale, and of a tile.
  index_t align = 32;
  for (const WeightType& type : plan.types) align = std::max({align, type.scale_rows, type.scale_cols});
  weights_.shards = runtime_->split(plan.intermediate, align);
}

void Experts::dequantize(Projection p, bf16_t* into) const {
  Runtime::Lease lease(*runtime_);
  lease.parallel_for(plan_.num_experts, [&](index_t expert, Arena&) {
    const Weight& w = weights_.of(p, static_cast<int>(expert));
    decode(lease.kernels(), whole(w), into + expert * w.rows * w.cols, w.cols);
  });
}

}  // namespace kt
