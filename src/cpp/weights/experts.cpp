#include "weights/experts.h"

#include <algorithm>

#include "base/error.h"
#include "gemm/decode.h"
#include "weights/homes.h"

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
      routed_(static_cast<std::size_t>(plan.num_experts)),
      weights_{plan.num_experts,     plan.hidden,
               plan.intermediate,    activation,
               placed_.weights,      placed_.fetch,
               biases_of(placed_),   placed_.spread.shards,
               placed_.spread.split, placed_.spread.placement,
               placed_.spread.homes, routed_.data()} {}

void Experts::dequantize(Projection p, bf16_t* into) const {
  Runtime::Lease lease(*runtime_);
  const index_t rows = weights_.rows(p), cols = weights_.cols(p);
  lease.parallel_for(plan_.num_experts, [&](index_t expert, Arena&) {
    for (std::size_t s = 0; s < weights_.shards.size(); ++s) {
      const Range slice = weights_.shards[s];
      if (slice.size() == 0) continue;
      const index_t first = p == Projection::down ? slice.begin : slice.begin * cols;
      decode(lease.kernels(), weights_.of(p, static_cast<int>(expert), s),
             into + expert * rows * cols + first, cols);
    }
  });
}

std::vector<int> Experts::homes() const {
  const Runtime::Lease lease(*runtime_);
  return weights_.homes;
}

bool Experts::rebalance(std::span<const double> popularity) {
  KT_CHECK(weights_.placement != Placement::tensor,
           "placement is \"tensor\": every expert lies in all shards, there is nothing to rebalance");
  const Runtime::Lease lease(*runtime_);
  const std::vector<double> so_far(routed_.begin(), routed_.end());
  std::vector<int> homes =
      assign_homes(plan_.num_experts, weights_of(*runtime_), popularity.empty() ? so_far : popularity);
  const bool moved = !placed_.move || placed_.move(homes);
  weights_.homes = std::move(homes);
  return moved;
}

std::vector<std::int64_t> Experts::routed() const {
  const Runtime::Lease lease(*runtime_);
  return routed_;
}

void Experts::reset_routed() {
  const Runtime::Lease lease(*runtime_);
  std::ranges::fill(routed_, 0);
}

std::vector<PageNodes> Experts::page_nodes() const {
  const Runtime::Lease lease(*runtime_);
  std::vector<PageNodes> nodes;
  for (std::size_t s = 0; s < weights_.shards.size(); ++s)
    nodes.push_back(sample_pages(weights_, s, runtime_->memory_of(s)));
  return nodes;
}

}  // namespace kt
