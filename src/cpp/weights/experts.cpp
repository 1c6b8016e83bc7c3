#include "weights/experts.h"

#include <algorithm>
#include <utility>

#include "base/error.h"
#include "base/memory.h"
#include "gemm/decode.h"
#include "weights/layer_memory.h"

namespace kt {

namespace {

constexpr index_t kPage = 4096;
constexpr index_t kMostPages = 4096;  // of all shards

// The codes of all that lies in a shard, as bytes. Scales lie beside them.
std::vector<MatView> codes_in(const ExpertWeights& weights, std::size_t shard) {
  std::vector<MatView> all;
  for (int e = 0; e < weights.num_experts; ++e) {
    if (!weights.homes.empty() && weights.homes[to_size(e)] != to_int(shard)) continue;
    for (const Projection p : projections_of(weights.gated))
      all.push_back(codes_of(weights.placement == Placement::tensor ? weights.of(p, e, shard)
                                                                    : whole(weights.of(p, e))));
  }
  return all;
}

}  // namespace

PageNodes sample_pages(const ExpertWeights& weights, std::size_t shard, std::span<const int> nodes) {
  const std::vector<MatView> all = codes_in(weights, shard);
  index_t bytes = 0;
  for (const MatView& codes : all) bytes += codes.rows * codes.cols;
  const index_t most = std::max(index_t{1}, kMostPages / std::ssize(weights.shards));
  const index_t stride = std::max(kPage, ceil_div(bytes, most));

  std::vector<const void*> pages;
  index_t at = 0;  // the next byte that is looked at, counted from the codes at hand
  for (const MatView& codes : all) {
    const index_t here = codes.rows * codes.cols;
    for (; at < here; at += stride) {
      const auto address = reinterpret_cast<std::uintptr_t>(codes.at(at / codes.cols, 0)) +
                           static_cast<std::uintptr_t>(at % codes.cols);
      pages.push_back(reinterpret_cast<const void*>(address / kPage * kPage));
    }
    at -= here;
  }
  std::ranges::sort(pages);
  pages.erase(std::unique(pages.begin(), pages.end()), pages.end());

  PageNodes count;
  for (const int node : nodes_of(pages)) {
    const bool near = nodes.empty() || std::ranges::find(nodes, node) != nodes.end();
    ++(node < 0 ? count.unknown : near ? count.wanted : count.elsewhere);
  }
  return count;
}

Experts::Experts(std::shared_ptr<Runtime> runtime, ExpertWeights weights, Storage storage)
    : runtime_(std::move(runtime)),
      storage_(std::move(storage)),
      routed_(to_size(weights.num_experts)),
      weights_(std::move(weights)) {
  weights_.routed = routed_.data();
  for (const Projection p : projections)
    if (const auto& biases = storage_.biases[index_of(p)]; !biases.empty())
      weights_.biases[index_of(p)] = biases.data();
}

void Experts::dequantize(Projection p, bf16_t* into) const {
  Runtime::Lease lease(*runtime_);
  const index_t rows = weights_.rows(p), cols = weights_.cols(p);
  lease.parallel_for(weights_.num_experts, [&](index_t expert, Arena&) {
    for (std::size_t s = 0; s < weights_.shards.size(); ++s) {
      const Range slice = weights_.shards[s];
      if (slice.size() == 0) continue;
      const index_t first = p == Projection::down ? slice.begin : slice.begin * cols;
      decode(lease.kernels(), weights_.of(p, to_int(expert), s), into + expert * rows * cols + first, cols);
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
      assign_homes(weights_.num_experts, weights_of(*runtime_), popularity.empty() ? so_far : popularity);
  const bool moved = storage_.own == nullptr || storage_.own->move(homes);
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
    nodes.push_back(sample_pages(weights_, s, runtime_->memory_nodes_of(s)));
  return nodes;
}

bool Experts::verify(const Report& report) const {
  return storage_.packed == nullptr || storage_.packed->verify(*runtime_, report);
}

}  // namespace kt
