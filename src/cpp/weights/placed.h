// Where the weights of a layer lie, and what keeps them there.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "moe/layer.h"
#include "weights/fill.h"
#include "weights/layer_plan.h"
#include "weights/quantize.h"

namespace kt {

// How a layer is spread over the shards of its runtime; the same words as in ExpertWeights.
struct Spread {
  std::vector<Range> shards;
  bool split = false;
  Placement placement = Placement::tensor;
  std::vector<int> homes = {};
};

struct Placed {
  std::shared_ptr<const void> memory;
  Spread spread;
  std::array<std::vector<Weight>, 3> weights;  // gate, up, down; as in ExpertWeights
  std::array<std::vector<bf16_t>, 3> biases;   // of gate, up, down; empty: none
  std::function<void(int expert)> fetch;       // see ExpertWeights
  // Of a packed file: reads all of it.
  std::function<bool(Runtime& runtime, const Report& report)> verify;
  // Of whole experts in memory of their own: see LayerMemory::move.
  std::function<bool(std::span<const int> homes)> move;
  bool refused = false;                // by the kernel: memory on the NUMA nodes of its shards
  bool mapped = false;                 // paged in from a file by access
  bool quantized = false;              // when they were loaded, with these errors
  std::array<QuantError, 3> errors{};  // of gate, up, down
};

// The matrices of a layer in one piece, or in one for each shard.
Placed place(std::span<const Piece> pieces, std::shared_ptr<const void> owner);

// Weights that are mapped from a file: `fetch` asks the operating system for those of an expert.
void page_in(Placed& placed);

}  // namespace kt
