#include "moe/plan.h"

#include <numeric>

namespace kt {

namespace {

constexpr index_t kTasksPerThread = 4;  // at least, where they are small
constexpr index_t kMostRanges = 4;      // of one task: each fetches the next one's weights
constexpr index_t kLeastCols = 24;      // of a range, or its input is read too often
constexpr index_t kGemvCols = 128;      // of a range for a GEMV, at least: runs of 256 bytes

}  // namespace

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
    if (expert_parallel)
      block.node = workers.node_of[static_cast<std::size_t>(experts.homes[static_cast<std::size_t>(e)])];
    for_mc_ranges(block, each, [&](const Block& rows) { add_token_block(rows, expert_parallel); });
  }
}

void Plan::add_token_block(Block block, bool expert_parallel) {
  most_rows = std::max(most_rows, block.count);
  all_by_gemv = all_by_gemv && block.count <= kernels_.gemv.max_rows;
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
    const auto ahead = static_cast<std::size_t>(std::max(2, plan.node_threads[node] / 2));
    const auto inputs = static_cast<std::size_t>(std::ranges::count_if(
        plan.blocks, [&](const Block& block) { return block.node == node && block.packer == block.index; }));
    rings.push_back({ahead, std::min(inputs, 2 * ahead)});
    slots.push_back(static_cast<index_t>(rings.back().slots));
  }
  const auto multiply_next = [&](Ring& ring) {
    for_readers(plan, ring.inputs[ring.multiplied++],
                [&](const Block& block) { steps.push_back({block.index, false}); });
  };
  for (const Block& block : plan.blocks) {
    if (block.packer != block.index) continue;
    Ring& ring = rings[block.node];
    const std::size_t turn = ring.inputs.size();
    steps.push_back({block.index, true, static_cast<index_t>(turn % ring.slots),
                     turn < ring.slots ? kNone : ring.inputs[turn - ring.slots]});
    ring.inputs.push_back(block.index);
    if (ring.inputs.size() > ring.ahead) multiply_next(ring);
  }
  for (Ring& ring : rings)
    while (ring.multiplied < ring.inputs.size()) multiply_next(ring);
}

}  // namespace kt
