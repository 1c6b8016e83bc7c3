// How the experts of a layer are divided among the shards of a runtime, in slices of the intermediate
// dimension or each expert whole; and the memory of their weights: how the matrices lie in it, on which NUMA
// nodes, and how all threads of a runtime write them.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <span>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "kernels/kernel_set.h"
#include "moe/layer.h"
#include "moe/runtime.h"
#include "weights/convert.h"

namespace kt {

// ValueError for a name that is not known.
Placement placement_from(std::string_view name);
std::string_view name_of(Placement placement);

struct ShardingOptions {
  Placement placement = Placement::tensor;
  std::vector<double> popularity = {};  // of each expert; none: they are alike
};

// ValueError for popularity that does not fit.
Sharding divide(const LayerShape& layer, const Runtime& runtime, const ShardingOptions& options);

// Cuts on multiples of this leave a slice's codes whole bytes, its rows whole cache lines, and every block
// that shares a scale in one slice; unless the block is as long as the dimension: its scale then goes to
// every slice. A slice cuts gate and up between rows, down between columns.
index_t cut_align(const std::array<WeightType, 3>& types, index_t intermediate);

// A runtime's shards by their shares of the work.
std::vector<index_t> weights_of(const Runtime& runtime);

// A shard for each expert. Shards have weights: their shares of the work. Experts with `popularity`, a number
// each: the most popular first, each to the shard that has least to do by its weight, as long as it has room:
// no shard holds more than its share of experts, rounded up, so that memory is shared out as well. With none,
// or nothing but zeros: neighbours together. ValueError for numbers that are too few, negative or not finite.
std::vector<int> assign_homes(int experts, std::span<const index_t> weights,
                              std::span<const double> popularity);

// A slice of the intermediate dimension of all experts in one piece of memory: expert by expert, each part of
// each matrix on a cache line. What a packed file holds behind its header.
struct LayerBlock {
  LayerShape shape;             // of the slice
  Range slice;                  // of the layer's intermediate dimension
  std::byte* memory = nullptr;  // of bytes()
  bool on_pages = false;  // every expert begins on a page, so that it can be placed without its neighbours

  static LayerBlock whole(const LayerShape& layer, std::byte* memory = nullptr) {
    return {layer, {0, layer.intermediate}, memory};
  }
  MutableWeight at(int expert, Projection p) const;
  index_t bytes() const { return shape.num_experts * expert_bytes(); }
  index_t expert_bytes() const;  // from one expert to the next
};

// Where the matrices of a layer lie that is in one block, or in one for each shard; as ExpertWeights has
// them.
std::array<std::vector<Weight>, 3> weights_in(std::span<const LayerBlock> blocks);

// Memory of its own for a layer, on the NUMA nodes of the shards it belongs to.
class LayerMemory {
 public:
  // A block for each shard if the placement is `tensor`, else one for all. Nothing of it is touched.
  LayerMemory(const Runtime& runtime, const LayerShape& layer, const Sharding& sharding);

  std::span<const LayerBlock> blocks() const { return blocks_; }
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
  std::vector<LayerBlock> blocks_;
  bool refused_ = false;
};

struct Matrix {
  int expert;
  Projection projection;
};

// Expert by expert.
std::vector<Matrix> matrices_of(const LayerShape& layer);

// Writes one matrix; called by several threads at once, each with scratch of its own. Returns the
// error of quantising it, if it was.
using Fill = std::function<QuantError(const Matrix& matrix, const MutableWeight& into,
                                      const KernelSet& kernels, Arena& scratch)>;

// Called on the caller's thread now and then, with the bytes done since the last call. What it throws ends
// the work. The runtime is taken meanwhile: it must not be used from there.
using Report = std::function<void(std::size_t bytes)>;

// Fills the blocks that make up a layer in the given order; in the end `nbytes` have been reported. A matrix
// is written where it lies, or if there are several blocks, to scratch, and each takes its slice: the bits
// are the same however it is cut. Returns the errors of gate, up and down, added expert by expert.
QuantErrors fill_all(Runtime& runtime, const LayerShape& layer, std::span<const LayerBlock> blocks,
                     const std::vector<Matrix>& order, std::size_t nbytes, const Fill& fill,
                     const Report& report);

// The same matrix with memory from `scratch`.
MutableWeight in_scratch(const MutableWeight& w, Arena& scratch);

}  // namespace kt
