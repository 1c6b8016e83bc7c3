#include "weights/page_nodes.h"

#include <algorithm>
#include <vector>

#include "base/numa.h"

namespace kt {

namespace {

constexpr index_t kPage = 4096;
constexpr index_t kMostPages = 4096;  // of all shards

// The codes of all that lies in a shard, as bytes. Scales lie beside them.
std::vector<MatView> codes_in(const ExpertWeights& weights, std::size_t shard) {
  std::vector<MatView> all;
  for (int e = 0; e < weights.num_experts; ++e) {
    if (!weights.homes.empty() && weights.homes[static_cast<std::size_t>(e)] != static_cast<int>(shard))
      continue;
    for (const Projection p : projections)
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
  const index_t step = std::max(kPage, ceil_div(bytes, most));

  std::vector<const void*> pages;
  index_t at = 0;  // the next byte that is looked at, counted from the codes at hand
  for (const MatView& codes : all) {
    const index_t here = codes.rows * codes.cols;
    for (; at < here; at += step) {
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

}  // namespace kt
