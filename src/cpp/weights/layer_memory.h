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

class LayerMemory {
 public:
  // A piece for each shard if the layer is split, else one for all. Nothing of it is touched.
  LayerMemory(const Runtime& runtime, LayerPlan plan, const Spread& spread);

  std::span<const Piece> pieces() const { return pieces_; }
  // Whether the kernel refused to place some of it, which then lies where it is first touched.
  bool refused() const { return refused_; }
  // Moves whole experts to their homes where they do not lie there; false if the kernel refused any, which
  // stay where they are. Addresses stay.
  bool move(std::span<const int> homes);

 private:
  std::span<std::byte> expert(std::size_t number) const;  // whole pages

  std::vector<std::vector<int>> nodes_;  // of each shard
  std::vector<int> at_;                  // the shard on whose nodes each whole expert lies
  std::vector<Buffer> buffers_;
  std::vector<Piece> pieces_;
  bool refused_ = false;
};

}  // namespace kt
