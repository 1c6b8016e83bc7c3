#include "weights/layer_memory.h"

#include "base/numa.h"

namespace kt {

bool place_experts(const LayerPlan& plan, std::byte* memory, std::span<const int> homes,
                   std::span<const std::vector<int>> nodes, bool move) {
  const auto each = static_cast<std::size_t>(plan.expert_bytes());
  bool placed = true;
  for (std::size_t first = 0, end; first < homes.size(); first = end) {
    end = first + 1;
    while (end < homes.size() && homes[end] == homes[first]) ++end;
    placed &= place_memory(memory + first * each, (end - first) * each,
                           nodes[static_cast<std::size_t>(homes[first])], move);
  }
  return placed;
}

LayerMemory::LayerMemory(const Runtime& runtime, LayerPlan plan, const Spread& spread) {
  for (std::size_t s = 0; s < spread.shards.size(); ++s) nodes_.push_back(runtime.memory_of(s));
  const auto add = [&](Range slice, const LayerPlan& piece, std::span<const int> nodes) {
    const Buffer& buffer = buffers_.emplace_back(static_cast<std::size_t>(piece.bytes()), nodes);
    refused_ |= buffer.refused();
    pieces_.push_back({slice, piece, static_cast<std::byte*>(buffer.data())});
  };
  const Range all{0, plan.intermediate};
  if (spread.split) {
    for (std::size_t s = 0; s < spread.shards.size(); ++s) {
      plan.intermediate = spread.shards[s].size();
      add(spread.shards[s], plan, nodes_[s]);
    }
  } else if (spread.shards.size() == 1) {
    add(all, plan, nodes_.front());
  } else {
    plan.on_pages = true;
    add(all, plan, {});
    refused_ = !move(spread.homes);
  }
}

bool LayerMemory::move(std::span<const int> homes) const {
  const Piece& all = pieces_.front();
  return place_experts(all.plan, all.memory, homes, nodes_, /*move=*/true);
}

}  // namespace kt
