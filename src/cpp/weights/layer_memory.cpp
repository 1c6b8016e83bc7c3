#include "weights/layer_memory.h"

#include "base/numa.h"

namespace kt {

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
    for (std::size_t e = 0; e < spread.homes.size(); ++e) {
      const std::span<std::byte> memory = expert(e);
      refused_ |=
          !place_memory(memory.data(), memory.size(), nodes_[static_cast<std::size_t>(spread.homes[e])]);
    }
    at_ = spread.homes;
  }
}

bool LayerMemory::move(std::span<const int> homes) {
  bool moved = true;
  for (std::size_t e = 0; e < at_.size(); ++e) {
    if (at_[e] == homes[e]) continue;
    const std::span<std::byte> memory = expert(e);
    if (move_memory(memory.data(), memory.size(), nodes_[static_cast<std::size_t>(homes[e])]))
      at_[e] = homes[e];
    else
      moved = false;
  }
  return moved;
}

std::span<std::byte> LayerMemory::expert(std::size_t number) const {
  const Piece& all = pieces_.front();
  const auto each = static_cast<std::size_t>(all.plan.expert_bytes());
  return {all.memory + number * each, each};
}

}  // namespace kt
