#include "moe/plan.h"

#include <limits>
#include <numeric>
#include <utility>

#include "base/error.h"

namespace kt {

namespace {

constexpr index_t kTasksPerThread = 4;  // at least, where they are small
constexpr index_t kMostRanges = 4;      // of one task: each fetches the next one's weights
constexpr index_t kLeastCols = 24;      // of a range, or its input is read too often
constexpr index_t kGemvCols = 128;      // of a range for a GEMV, at least: runs of 256 bytes

std::int64_t expert_at(const MatView& ids, index_t i) {
  return ids.dtype == DType::i64 ? static_cast<const std::int64_t*>(ids.data)[i]
                                 : static_cast<const std::int32_t*>(ids.data)[i];
}

// Calls put(entry, place) for all entries of topk_ids in order. Those of an expert have places that follow
// one another from next[expert] on; -1 if that is.
template <class Put>
void for_places(const MatView& topk_ids, std::vector<std::int32_t> next, const Put& put) {
  for (index_t i = 0; i < topk_ids.rows * topk_ids.cols; ++i) {
    std::int32_t& place = next[to_size(expert_at(topk_ids, i))];
    put(to_size(i), place < 0 ? -1 : place++);
  }
}

}  // namespace

std::vector<std::int32_t> count_routes_of_each(const MatView& ids, int num_experts) {
  KT_CHECK(ids.rows * ids.cols <= std::numeric_limits<std::int32_t>::max(),
           "topk_ids has {} x {} entries, more than 2^31 - 1", ids.rows, ids.cols);
  std::vector<std::int32_t> routes(to_size(num_experts) + 1);
  for (index_t i = 0; i < ids.rows * ids.cols; ++i) {
    const std::int64_t e = expert_at(ids, i);
    KT_CHECK(e >= 0 && e <= num_experts,
             "topk_ids[{}, {}] is {}, wanted an expert in [0, {}) or {} for no route", i / ids.cols,
             i % ids.cols, e, num_experts, num_experts);
    ++routes[to_size(e)];
  }
  return routes;
}

index_t count_routes(const MatView& topk_ids, int num_experts) {
  return topk_ids.rows * topk_ids.cols - count_routes_of_each(topk_ids, num_experts).back();
}

void sort_routes(const MatView& topk_ids, int num_experts, const std::vector<int>& experts,
                 std::span<std::int32_t> permutation, std::span<std::int32_t> inverse) {
  const std::vector<std::int32_t> routes = count_routes_of_each(topk_ids, num_experts);
  std::vector<std::int32_t> next(routes.size(), -1);  // where the next route of each expert goes
  std::int32_t first = 0;
  for (const int e : experts) {
    KT_CHECK(e >= 0 && e < num_experts && next[to_size(e)] < 0,
             "experts has {}, wanted numbers in [0, {}), each once", e, num_experts);
    next[to_size(e)] = std::exchange(first, first + routes[to_size(e)]);
  }
  KT_CHECK(std::ssize(permutation) == first && std::ssize(inverse) == topk_ids.rows * topk_ids.cols,
           "there is room for {} routes and {} entries, wanted {} and {}", permutation.size(), inverse.size(),
           first, topk_ids.rows * topk_ids.cols);
  for_places(topk_ids, next, [&](std::size_t i, std::int32_t place) {
    inverse[i] = place;
    if (place >= 0) permutation[to_size(place)] = static_cast<std::int32_t>(i);
  });
}

Routing route(const MatView& topk_ids, int num_experts) {
  const std::vector<std::int32_t> routes = count_routes_of_each(topk_ids, num_experts);
  Routing r;
  r.expert_offsets.push_back(0);
  for (int e = 0; e < num_experts; ++e) {
    const std::int32_t n = routes[to_size(e)];
    r.expert_offsets.push_back(r.expert_offsets.back() + n);
    if (n > 0) r.experts.push_back(e);
  }
  r.sorted_token_ids.resize(to_size(r.expert_offsets.back()));
  r.sorted_slots.resize(r.sorted_token_ids.size());
  std::vector<std::int32_t> next(r.expert_offsets);
  next.back() = -1;  // of no expert
  for_places(topk_ids, next, [&](std::size_t i, std::int32_t place) {
    if (place < 0) return;
    r.sorted_token_ids[to_size(place)] = static_cast<std::int32_t>(static_cast<index_t>(i) / topk_ids.cols);
    r.sorted_slots[to_size(place)] = static_cast<std::int32_t>(i);
  });
  r.token_offsets.resize(to_size(topk_ids.rows) + 1);
  for (const std::int32_t t : r.sorted_token_ids) ++r.token_offsets[to_size(t) + 1];
  std::partial_sum(r.token_offsets.begin(), r.token_offsets.end(), r.token_offsets.begin());
  r.inverse_permutation.resize(r.sorted_token_ids.size());
  next.assign(r.token_offsets.begin(), r.token_offsets.end());
  for (std::int32_t i = 0; i < r.expert_offsets.back(); ++i) {
    const auto t = to_size(r.sorted_token_ids[to_size(i)]);
    r.inverse_permutation[to_size(next[t]++)] = i;
  }
  return r;
}

Range nc_of_task(const NcRanges& ranges, index_t task, index_t per_task) {
  return {ranges[task * per_task].begin, ranges[std::min(ranges.count, (task + 1) * per_task) - 1].end};
}

Plan::Plan(const Routing& routing, const ExpertWeights& experts, const KernelSet& kernels,
           const Workers& workers)
    : node_threads(workers.threads),
      threads(std::accumulate(node_threads.begin(), node_threads.end(), 0)),
      cache_bytes(std::min(static_cast<index_t>(workers.l2_bytes) / 2, kMostCacheBytes)),
      kernels_(kernels) {
  const bool expert_parallel = experts.placement == Placement::expert;
  for (std::size_t s = 0; s < experts.shards.size() && !expert_parallel; ++s)
    if (experts.shards[s].size() > 0) shards.push_back({experts.shards[s], s, workers.node_of[s]});
  if (shards.empty()) shards.push_back({{0, experts.intermediate}, 0, 0});
  for (const int e : routing.experts) {
    const index_t count = routing.count(e), cuts = ceil_div(count, kBlockRows);
    const index_t each = round_up(ceil_div(count, cuts), kernels.gemm.nr);
    Block block{e, 0, 0, 0, 0, routing.first(e), count};
    if (expert_parallel) block.node = workers.node_of[to_size(experts.homes[to_size(e)])];
    for (const index_t end = block.first + count; block.first < end; block.first += each) {
      block.count = std::min(each, end - block.first);
      add_token_block(block, expert_parallel);
    }
  }
}

void Plan::add_token_block(Block block, bool expert_parallel) {
  most_rows = std::max(most_rows, block.count);
  all_by_gemv = all_by_gemv && by_gemv(block);
  const std::size_t root = blocks.size();
  std::vector<std::size_t> packers(node_threads.size(), blocks.max_size());
  for (std::size_t i = 0; i < shards.size(); ++i) {
    block.index = blocks.size();
    block.shard = (root / shards.size() + i) % shards.size();  // shards are roots in turn
    if (!expert_parallel) block.node = shards[block.shard].node;
    std::size_t& first = packers[block.node];
    block.packer = first = std::min(first, block.index);
    blocks.push_back(block);
  }
}

NcRanges Plan::nc_ranges(index_t n, index_t tile, index_t bytes) const {
  const auto cut = [&](index_t count, index_t most) {
    return NcRanges{n, std::clamp(count, index_t{1}, most), tile};
  };
  if (all_by_gemv)
    return cut(ceil_div(kTasksPerThread * threads, std::max(std::ssize(blocks), index_t{1})),
               ceil_div(n, std::max(tile, kGemvCols)));
  return cut(ceil_div(n, std::max(round_up(kLeastCols, tile), cache_bytes / bytes)), ceil_div(n, tile));
}

index_t Plan::ranges_per_task(const NcRanges& ranges) const {
  return std::clamp(ranges.count * std::ssize(blocks) / (kTasksPerThread * threads), index_t{1}, kMostRanges);
}

PackSchedule::PackSchedule(const Plan& plan) {
  struct Ring {
    std::size_t ahead, slots;              // inputs that are packed before the first is multiplied
    std::vector<std::size_t> inputs = {};  // the blocks that packed into it
    std::size_t multiplied = 0;            // of these inputs
  };
  std::vector<Ring> rings;
  for (std::size_t node = 0; node < plan.node_threads.size(); ++node) {
    const auto ahead = to_size(std::max(2, plan.node_threads[node] / 2));
    const auto inputs = to_size(std::ranges::count_if(
        plan.blocks, [&](const Block& block) { return block.node == node && block.packer == block.index; }));
    rings.push_back({ahead, std::min(inputs, 2 * ahead)});
    slots.push_back(static_cast<index_t>(rings.back().slots));
  }
  const auto multiply_next = [&](Ring& ring) {
    for_readers(plan, ring.inputs[ring.multiplied++],
                [&](const Block& block) { actions.push_back({block.index, false}); });
  };
  for (const Block& block : plan.blocks) {
    if (block.packer != block.index) continue;
    Ring& ring = rings[block.node];
    const std::size_t turn = ring.inputs.size();
    actions.push_back({block.index, true, static_cast<index_t>(turn % ring.slots),
                       turn < ring.slots ? kNone : ring.inputs[turn - ring.slots]});
    ring.inputs.push_back(block.index);
    if (ring.inputs.size() > ring.ahead) multiply_next(ring);
  }
  for (Ring& ring : rings)
    while (ring.multiplied < ring.inputs.size()) multiply_next(ring);
}

}  // namespace kt
