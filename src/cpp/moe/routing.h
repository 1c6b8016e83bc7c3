// Sorts routed tokens by expert. Pure: no threads.
#pragma once

#include <cstdint>
#include <vector>

#include "base/view.h"

namespace kt {

// The routed tokens of a call, (token, expert) pairs, sorted by expert, then token, then slot. Their number
// in that order is what "route" counts.
struct Routing {
  std::vector<std::int32_t>
      expert_offsets;  // [E + 1]: expert e has expert_offsets[e] .. expert_offsets[e + 1]
  std::vector<std::int32_t> sorted_token_ids;  // [routes]
  std::vector<std::int32_t>
      sorted_slots;                   // [routes]: token * K + slot, the place in topk_ids and topk_weights
  std::vector<std::int32_t> experts;  // those that have a routed token
  // The routes of token t, experts in order, are inverse_permutation[token_offsets[t]] up to [token_offsets[t
  // + 1]].
  std::vector<std::int32_t> token_offsets, inverse_permutation;

  index_t routes() const { return static_cast<index_t>(sorted_token_ids.size()); }
  index_t first(int expert) const { return expert_offsets[static_cast<std::size_t>(expert)]; }
  index_t count(int expert) const {
    return expert_offsets[static_cast<std::size_t>(expert) + 1] - first(expert);
  }
};

// topk_ids: [T, K] int32 or int64 in [0, E]; E means "no route". ValueError names the first entry outside.
index_t count_routes(const MatView& topk_ids, int num_experts);
Routing route(const MatView& topk_ids, int num_experts);

}  // namespace kt
