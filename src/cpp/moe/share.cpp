#include "moe/share.h"

#include <algorithm>

#include "kernels/kernel_set.h"
#include "moe/block.h"

namespace kt {

namespace {

Amount amount(index_t routes) {
  const auto rows = static_cast<double>(routes);
  return {rows, static_cast<double>(ceil_div(routes, kBlockRows)), routes > kFewRows ? rows : 0};
}

// Every expert's routes to its home.
void give_whole(const LayerCall& call, const std::vector<int>& homes, std::vector<Share>& shares) {
  for (std::size_t e = 0; e < homes.size(); ++e) {
    Share& home = shares[static_cast<std::size_t>(homes[e])];
    home += amount(call.routes[e]);
    home.experts += 1;
  }
  for (Share& share : shares) share.home_routes = share.routes, share.home_blocks = share.blocks;
}

// All routes to every shard; their blocks are at home on all shards in turn.
void give_slices(const LayerCall& call, std::vector<Share>& shares) {
  Amount all;
  std::size_t block = 0;
  for (const index_t routes : call.routes) {
    const Amount own = amount(routes);
    all += own;
    for (double b = 0; b < own.blocks; ++b, ++block) {
      Share& home = shares[block % shares.size()];
      home.home_routes += own.routes / own.blocks;
      home.home_blocks += 1;
    }
  }
  for (Share& share : shares) {
    if (share.width == 0) continue;
    share += all;
    share.experts = static_cast<double>(call.routes.size());
  }
}

}  // namespace

std::vector<Share> share_out(const LayerCall& call, const Division& division, bool whole) {
  std::vector<Share> shares;
  for (const Range& shard : division.shards) {
    Share& share = shares.emplace_back();
    const auto width = static_cast<double>(shard.size());
    share.width = whole ? static_cast<double>(call.intermediate) : width;
    share.part = width / static_cast<double>(std::max<index_t>(1, call.intermediate));
  }
  if (whole)
    give_whole(call, division.homes, shares);
  else
    give_slices(call, shares);
  for (std::size_t e = 0; e < division.homes.size(); ++e)
    shares[static_cast<std::size_t>(division.homes[e])].weight_blocks += amount(call.routes[e]).blocks;
  return shares;
}

}  // namespace kt
