// Memory of its own for a layer, on the NUMA nodes of the shards it belongs to.
#pragma once

#include <span>
#include <vector>

#include "base/arena.h"
#include "moe/runtime.h"
#include "weights/fill.h"
#include "weights/layer_plan.h"
#include "weights/placed.h"

namespace kt {

// Asks that the pages of every expert come from the nodes of its home, given for each shard; experts begin on
// pages. With `move`, pages that are there already move. False where the kernel refuses any of it.
bool place_experts(const LayerPlan& plan, std::byte* memory, std::span<const int> homes,
                   std::span<const std::vector<int>> nodes, bool move);

class LayerMemory {
 public:
  // A piece for each shard if the layer is split, else one for all. Nothing of it is touched.
  LayerMemory(const Runtime& runtime, LayerPlan plan, const Spread& spread);

  std::span<const Piece> pieces() const { return pieces_; }
  // Whether the kernel refused to place some of it, which then lies where it is first touched.
  bool refused() const { return refused_; }
  // Moves whole experts to their new homes; false as above. Their addresses stay.
  bool move(std::span<const int> homes) const;

 private:
  std::vector<std::vector<int>> nodes_;  // of each shard
  std::vector<Buffer> buffers_;
  std::vector<Piece> pieces_;
  bool refused_ = false;
};

}  // namespace kt
