// The plan of a pass is plain data: made here for machines of any size, without a thread.
#include "moe/plan.h"

#include <doctest/doctest.h>

#include <set>
#include <vector>

#include "kernels/registry.h"

using namespace kt;

namespace {

// One slot a token; `rows` tokens for each expert.
Routing routing_of(const std::vector<index_t>& rows) {
  std::vector<std::int32_t> ids;
  for (std::size_t e = 0; e < rows.size(); ++e)
    ids.insert(ids.end(), static_cast<std::size_t>(rows[e]), static_cast<std::int32_t>(e));
  return route(view(ids.data(), DType::i32, std::ssize(ids), 1), static_cast<int>(rows.size()));
}

// Four shards of which one is empty, two of them on the first of two nodes.
ExpertWeights experts_of(int num_experts, Placement placement) {
  ExpertWeights experts;
  experts.num_experts = num_experts, experts.hidden = 256, experts.intermediate = 96;
  experts.shards = {{0, 32}, {32, 64}, {64, 64}, {64, 96}};
  experts.placement = placement;
  for (int e = 0; e < num_experts; ++e) experts.homes.push_back(e % 4);
  return experts;
}

const Workers kTwoNodes{{2, 6}, {0, 0, 1, 1}, 1 << 20};

// Every input is packed before it is multiplied, and no slot is filled again before its products are added.
void check_schedule(const Plan& plan) {
  const PackSchedule schedule(plan);
  std::set<std::size_t> packed, multiplied;
  std::vector<std::vector<std::size_t>> in_slot(plan.node_threads.size());
  for (std::size_t node = 0; node < in_slot.size(); ++node)
    in_slot[node].assign(static_cast<std::size_t>(schedule.slots[node]), PackSchedule::kNone);
  for (const PackSchedule::Action& action : schedule.actions) {
    const Block& block = plan.blocks[action.block];
    if (!action.packs) {
      CHECK(packed.contains(block.packer));
      CHECK(multiplied.insert(action.block).second);
      continue;
    }
    CHECK(block.packer == action.block);
    CHECK(packed.insert(action.block).second);
    std::size_t& slot = in_slot[block.node][static_cast<std::size_t>(action.slot)];
    CHECK(action.emptied == slot);
    if (slot != PackSchedule::kNone)
      for_readers(plan, slot, [&](const Block& reader) { CHECK(multiplied.contains(reader.index)); });
    slot = action.block;
  }
  CHECK(multiplied.size() == plan.blocks.size());
}

}  // namespace

TEST_CASE("token blocks hold every routed token once a shard, and shards are roots in turn") {
  const KernelSet kernels = kernel_set("scalar", 0);
  const ExpertWeights experts = experts_of(3, Placement::tensor);
  const Routing routing = routing_of({1300, 0, 5});
  const Plan plan(routing, experts, kernels, kTwoNodes);
  CHECK(plan.shards.size() == 3);  // without the empty one
  CHECK(plan.threads == 8);
  CHECK_FALSE(plan.all_by_gemv);
  index_t next = 0;
  std::set<std::size_t> roots;
  for (std::size_t b = 0; b < plan.blocks.size(); b += 3) {
    const Block& root = plan.blocks[b];
    CHECK(plan.is_root(root));
    CHECK(root.first == next);
    CHECK(root.count <= kBlockRows);
    CHECK(root.packer == b);
    next += root.count;
    roots.insert(root.shard);
    std::set<std::size_t> shards;
    for (const Block& block : plan.token_block(root)) {
      CHECK(&plan.root(block) == &root);
      CHECK(block.first == root.first);
      CHECK(block.node == plan.shards[block.shard].node);
      CHECK(plan.blocks[block.packer].node == block.node);
      CHECK(plan.width(block) == 32);
      shards.insert(block.shard);
    }
    CHECK(shards.size() == 3);
  }
  CHECK(next == 1305);
  CHECK(roots.size() == 3);
  check_schedule(plan);
}

TEST_CASE("an expert that lives on one shard is computed by that shard's node") {
  const KernelSet kernels = kernel_set("scalar", 0);
  const ExpertWeights experts = experts_of(4, Placement::expert);
  const Routing routing = routing_of({40, 40, 40, 40});
  const Plan plan(routing, experts, kernels, kTwoNodes);
  CHECK(plan.shards.size() == 1);
  for (const Block& block : plan.blocks) {
    CHECK(block.node == (block.expert < 2 ? 0 : 1));
    CHECK(plan.width(block) == experts.intermediate);
  }
  check_schedule(plan);
}

TEST_CASE("a schedule of more blocks than a ring has slots") {
  const KernelSet kernels = kernel_set("scalar", 0);
  for (const Placement placement : {Placement::tensor, Placement::expert}) {
    const ExpertWeights experts = experts_of(40, placement);
    const Routing routing = routing_of(std::vector<index_t>(40, 3));
    const Plan plan(routing, experts, kernels, kTwoNodes);
    CHECK(plan.all_by_gemv);
    check_schedule(plan);
    CHECK(PackSchedule(plan).slots == std::vector<index_t>{4, 6});
  }
  check_schedule(Plan(routing_of({0, 0}), experts_of(2, Placement::tensor), kernels, kTwoNodes));
}

TEST_CASE("NC ranges cover the columns, on multiples of a tile, and fill the cache") {
  const KernelSet kernels = kernel_set("scalar", 0);
  const ExpertWeights experts = experts_of(1, Placement::tensor);
  const Routing routing = routing_of({100});
  const Plan plan(routing, experts, kernels, kTwoNodes);
  CHECK(plan.cache_bytes == 512 << 10);
  for (const index_t n : {1, 24, 100, 1000, 4096}) {
    const NcRanges ranges = plan.nc_ranges(n, 16, 4096);
    const index_t per_task = plan.ranges_per_task(ranges);
    index_t next = 0;
    for (index_t task = 0; task < ceil_div(ranges.count, per_task); ++task) {
      const Range all = nc_of_task(ranges, task, per_task);
      CHECK(all.begin == next);
      for_nc_ranges(ranges, task, per_task, [&](index_t, Range nc, Range after) {
        CHECK(nc.begin == next);
        CHECK(nc.begin % 16 == 0);
        CHECK(nc.size() * 4096 <= plan.cache_bytes + 16 * 4096);
        CHECK(after.begin == nc.end);
        next = nc.end;
      });
      CHECK(all.end == next);
    }
    CHECK(next == n);
  }
}
