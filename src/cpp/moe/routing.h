// Groups routes by expert. Pure: no threads.
#pragma once

#include <cstdint>
#include <vector>

#include "base/view.h"

namespace kt {

// A route is one (token, slot) pair with an expert; routes are numbered by expert, then token, then slot.
struct Routing {
  std::vector<std::int32_t> offset;   // [E + 1]: routes of expert e are offset[e] .. offset[e + 1]
  std::vector<std::int32_t> token;    // [routes]
  std::vector<std::int32_t> slot;     // [routes]: token * K + slot, the place in topk_ids and topk_weights
  std::vector<std::int32_t> experts;  // those that have a route
  // The routes of token t, experts in order: of_token[token_offset[t]] .. of_token[token_offset[t + 1]].
  std::vector<std::int32_t> token_offset, of_token;

  index_t routes() const { return static_cast<index_t>(token.size()); }
  index_t first(int expert) const { return offset[static_cast<std::size_t>(expert)]; }
  index_t count(int expert) const { return offset[static_cast<std::size_t>(expert) + 1] - first(expert); }
};

// topk_ids: [T, K] int32 or int64 in [0, E]; E means "no route". ValueError names the first entry outside.
index_t count_routes(const MatView& topk_ids, int num_experts);
Routing route(const MatView& topk_ids, int num_experts);

}  // namespace kt
