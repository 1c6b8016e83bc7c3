#include "weights/sharding.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "base/error.h"

namespace kt {

namespace {

void check(int experts, std::span<const double> popularity) {
  KT_CHECK(std::ssize(popularity) == experts, "popularity has {} numbers, wanted {}: one an expert",
           popularity.size(), experts);
  for (std::size_t e = 0; e < popularity.size(); ++e)
    KT_CHECK(std::isfinite(popularity[e]) && popularity[e] >= 0,
             "popularity of expert {} is {}, wanted a finite number that is not negative", e, popularity[e]);
}

}  // namespace

Placement placement_from(std::string_view name) {
  for (const Placement placement : {Placement::tensor, Placement::expert})
    if (name == name_of(placement)) return placement;
  throw ValueError(message("placement is \"{}\", wanted \"tensor\" or \"expert\"", name));
}

std::string_view name_of(Placement placement) { return placement == Placement::tensor ? "tensor" : "expert"; }

std::vector<index_t> weights_of(const Runtime& runtime) {
  std::vector<index_t> weights;
  for (std::size_t s = 0; s < static_cast<std::size_t>(runtime.shards()); ++s)
    weights.push_back(runtime.weight_of(s));
  return weights;
}

std::vector<int> assign_homes(int experts, std::span<const index_t> weights,
                              std::span<const double> popularity) {
  if (!popularity.empty()) check(experts, popularity);
  constexpr index_t kMost = index_t{1} << 40;  // times experts they stay in index_t
  for (index_t sum = 0; const index_t weight : weights) {
    KT_CHECK(weight >= 0 && weight <= kMost - sum, "weights of shards add up to more than {}", kMost);
    sum += weight;
  }
  KT_CHECK(experts <= 1 << 22, "there are {} experts, wanted at most {}", experts, 1 << 22);
  std::vector<int> homes(static_cast<std::size_t>(experts));
  if (std::ranges::all_of(popularity, [](double p) { return p == 0; })) {
    const std::vector<Range> runs = split_by(experts, weights, 1);
    for (std::size_t s = 0; s < runs.size(); ++s)
      std::fill(homes.begin() + runs[s].begin, homes.begin() + runs[s].end, static_cast<int>(s));
    return homes;
  }

  const index_t all = std::reduce(weights.begin(), weights.end());
  std::vector<index_t> room;
  for (const index_t weight : weights) room.push_back(ceil_div(experts * weight, all));
  std::vector<std::size_t> order(homes.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  std::ranges::stable_sort(order, std::greater{}, [&](std::size_t e) { return popularity[e]; });
  const double most = popularity[order.front()];  // in its units no sum leaves the range of numbers
  std::vector<double> load(weights.size(), 0.0);
  for (const std::size_t e : order) {
    const double share = popularity[e] / most;
    std::size_t best = weights.size();
    double least = 0;
    for (std::size_t s = 0; s < weights.size(); ++s) {
      if (room[s] == 0) continue;
      const double after = (load[s] + share) / static_cast<double>(weights[s]);
      if (best == weights.size() || after < least) best = s, least = after;
    }
    homes[e] = static_cast<int>(best);
    load[best] += share;
    --room[best];
  }
  return homes;
}

index_t cut_align(const std::array<WeightType, 3>& types, index_t intermediate) {
  index_t align = 32;
  for (const Projection p : projections) {
    const WeightType& type = types[index_of(p)];
    if (type.scale == ScaleType::none) continue;
    const index_t block = p == Projection::down ? type.scale_cols : type.scale_rows;
    if (block > 0 && block < intermediate) align = std::lcm(align, block);
  }
  return align;
}

Sharding divide(const LayerShape& layer, const Runtime& runtime, const ShardingOptions& options) {
  const bool tensor = options.placement == Placement::tensor;
  KT_CHECK(!tensor || options.popularity.empty(),
           "popularity is given, but placement is \"tensor\": every expert lies in all shards");
  Sharding sharding{options.placement,
                    runtime.split(layer.intermediate, cut_align(layer.types, layer.intermediate))};
  if (!tensor) sharding.homes = assign_homes(layer.num_experts, weights_of(runtime), options.popularity);
  return sharding;
}

}  // namespace kt
