#include "moe/routing.h"

#include <limits>
#include <numeric>

#include "base/error.h"

namespace kt {

namespace {

std::int64_t expert_at(const MatView& ids, index_t i) {
  return ids.dtype == DType::i64 ? static_cast<const std::int64_t*>(ids.data)[i]
                                 : static_cast<const std::int32_t*>(ids.data)[i];
}

// Routes of each expert, after checking every id.
std::vector<std::int32_t> histogram(const MatView& ids, int num_experts) {
  KT_CHECK(ids.rows * ids.cols <= std::numeric_limits<std::int32_t>::max(),
           "topk_ids has {} x {} entries, more than 2^31 - 1", ids.rows, ids.cols);
  std::vector<std::int32_t> routes(static_cast<std::size_t>(num_experts) + 1);
  for (index_t i = 0; i < ids.rows * ids.cols; ++i) {
    const std::int64_t e = expert_at(ids, i);
    KT_CHECK(e >= 0 && e <= num_experts,
             "topk_ids[{}, {}] is {}, wanted an expert in [0, {}) or {} for no route", i / ids.cols,
             i % ids.cols, e, num_experts, num_experts);
    ++routes[static_cast<std::size_t>(e)];
  }
  return routes;
}

}  // namespace

index_t count_routes(const MatView& topk_ids, int num_experts) {
  return topk_ids.rows * topk_ids.cols - histogram(topk_ids, num_experts).back();
}

Routing route(const MatView& topk_ids, int num_experts) {
  const std::vector<std::int32_t> routes = histogram(topk_ids, num_experts);
  Routing r;
  r.expert_offsets.push_back(0);
  for (int e = 0; e < num_experts; ++e) {
    const std::int32_t n = routes[static_cast<std::size_t>(e)];
    r.expert_offsets.push_back(r.expert_offsets.back() + n);
    if (n > 0) r.experts.push_back(e);
  }
  r.sorted_token_ids.resize(static_cast<std::size_t>(r.expert_offsets.back()));
  r.sorted_slots.resize(r.sorted_token_ids.size());
  std::vector<std::int32_t> next(r.expert_offsets);
  for (index_t i = 0; i < topk_ids.rows * topk_ids.cols; ++i) {
    const std::int64_t e = expert_at(topk_ids, i);
    if (e == num_experts) continue;
    const auto place = static_cast<std::size_t>(next[static_cast<std::size_t>(e)]++);
    r.sorted_token_ids[place] = static_cast<std::int32_t>(i / topk_ids.cols);
    r.sorted_slots[place] = static_cast<std::int32_t>(i);
  }
  r.token_offsets.resize(static_cast<std::size_t>(topk_ids.rows) + 1);
  for (const std::int32_t t : r.sorted_token_ids) ++r.token_offsets[static_cast<std::size_t>(t) + 1];
  std::partial_sum(r.token_offsets.begin(), r.token_offsets.end(), r.token_offsets.begin());
  r.inverse_permutation.resize(r.sorted_token_ids.size());
  next.assign(r.token_offsets.begin(), r.token_offsets.end());
  for (std::int32_t i = 0; i < r.expert_offsets.back(); ++i) {
    const auto t = static_cast<std::size_t>(r.sorted_token_ids[static_cast<std::size_t>(i)]);
    r.inverse_permutation[static_cast<std::size_t>(next[t]++)] = i;
  }
  return r;
}

}  // namespace kt
