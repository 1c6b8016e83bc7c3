// Brings the experts of a layer to where they are computed from: into memory, quantised on the way where that
// is wanted, into a packed file, or nowhere, if the checkpoint's own bytes will do.
#pragma once

#include <filesystem>
#include <functional>
#include <memory>
#include <optional>

#include "weights/expert_index.h"
#include "weights/experts.h"
#include "weights/layer_memory.h"

namespace kt {

// One [rows, cols] matrix, bf16, fp16 or fp32, an expert and projection; read by several threads at once.
using Matrices = std::function<MatView(int expert, Projection p)>;

// [E, rows] of gate, up and down, bf16, fp16 or fp32; without data where there is none.
using Biases = std::array<MatView, 3>;

// Layers in memory of their own lie there on the shards' NUMA nodes; mapped ones lie where the page cache has
// them. ValueError for popularity that does not fit, here and below.
std::shared_ptr<Experts> experts_from_matrices(std::shared_ptr<Runtime> runtime, const LayerShape& layer,
                                               Activation activation, const Matrices& matrices,
                                               const Biases& biases, const ShardingOptions& sharding);

struct LoadOptions {
  Activation activation = Activation::silu;
  ShardingOptions sharding = {};
  std::optional<Format> format;  // none: as the checkpoint stores them
  // Where packed layers are kept: one that fits is mapped, else it is made first.
  std::optional<std::filesystem::path> cache_dir;
  bool paged = false;  // stay in the checkpoint's files
  // Where processes of this machine find each other's layers (shared_layer.h): one loads it, all map it.
  std::optional<std::filesystem::path> shared_dir;
  std::optional<Range> experts;                       // none: all; else numbered from 0 once loaded
  std::function<void(const std::string& text)> warn;  // called on the caller's thread; may be empty
};

// Throws what reading the checkpoint throws; ValueError for `paged` with a layout that is not the one in
// memory, and for `experts` that the layer does not have.
std::shared_ptr<Experts> experts_from_checkpoint(std::shared_ptr<Runtime> runtime,
                                                 std::shared_ptr<const ExpertIndex> index, int layer,
                                                 const LoadOptions& options, const Report& report);

}  // namespace kt
