// The frozen experts of one layer, wherever they lie: memory of their own, or a mapped file. Their numbers
// are immutable. What changes are the homes of experts and the count of their routes: between the runtime's
// calls.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "weights/expert_index.h"
#include "weights/layer_memory.h"
#include "weights/packed_file.h"

namespace kt {

// What keeps a layer's weights where ExpertWeights says they lie, and what is known of them.
struct Storage {
  // One of these.
  std::shared_ptr<LayerMemory> own = {};
  std::shared_ptr<const PackedFile> packed = {};
  std::shared_ptr<const ExpertIndex> checkpoint = {};  // whose files are mapped

  bool shared = false;  // what is packed is memory of several processes, else a file on a disk
  std::array<std::vector<bf16_t>, 3> biases = {};  // of gate, up and down; empty: none
  std::optional<QuantErrors> errors = {};          // if the weights were quantised when they were loaded
};

struct PageNodes {
  index_t wanted = 0, elsewhere = 0, unknown = 0;  // unknown: not in memory, or the kernel does not tell
};

// Whether the weights of a shard lie on these NUMA nodes, as the kernel tells of a sample of their pages: at
// most a few thousand, evenly over the shard's part of the weights: slices of all experts, or the experts at
// home there. No `nodes`: any will do.
PageNodes sample_pages(const ExpertWeights& weights, std::size_t shard, std::span<const int> nodes);

class Experts {
 public:
  Experts(std::shared_ptr<Runtime> runtime, ExpertWeights weights, Storage storage);
  Experts(const Experts&) = delete;
  Experts& operator=(const Experts&) = delete;

  const ExpertWeights& weights() const { return weights_; }
  const std::optional<QuantErrors>& errors() const { return storage_.errors; }
  // Whether they are paged in from a file by access.
  bool mapped() const {
    return (storage_.packed != nullptr && !storage_.shared) || storage_.checkpoint != nullptr;
  }
  // Whether they lie in memory that other processes may have mapped too.
  bool shared() const { return storage_.shared; }
  // Whether the kernel refused memory on the NUMA nodes of the shards.
  bool refused() const { return storage_.own != nullptr && storage_.own->refused(); }
  Runtime& runtime() const { return *runtime_; }

  // These wait for a call in progress.

  // A projection of all experts in bf16, [E, rows, cols]: exactly what the kernels multiply by.
  void dequantize(Projection p, bf16_t* into) const;
  // A shard for each expert; none if they are split.
  std::vector<int> homes() const;
  // New homes by popularity, or without, by the routes so far; memory of the layer's own moves along. False
  // where the kernel refuses that. ValueError for Placement::tensor, and what assign_homes refuses.
  bool rebalance(std::span<const double> popularity);
  // The routes that every forward so far had for each expert.
  std::vector<std::int64_t> routed() const;
  void reset_routed();
  // Where pages of each shard's weights lie, by a sample.
  std::vector<PageNodes> page_nodes() const;
  // Reads all of a packed file, or of shared memory: whether the weights are those that were written.
  bool verify(const Report& report) const;

 private:
  std::shared_ptr<Runtime> runtime_;
  Storage storage_;
  std::vector<std::int64_t> routed_;
  ExpertWeights weights_;
};

}  // namespace kt
