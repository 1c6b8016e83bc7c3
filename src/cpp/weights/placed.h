// Where the weights of a layer lie, and what keeps them there.
#pragma once

#include <array>
#include <functional>
#include <memory>
#include <vector>

#include "moe/layer.h"
#include "weights/fill.h"
#include "weights/layer_plan.h"
#include "weights/quantize.h"

namespace kt {

struct Placed {
  std::shared_ptr<const void> memory;
  std::array<std::vector<Weight>, 3> weights;  // gate, up, down; one an expert
  std::array<std::vector<bf16_t>, 3> biases;   // of gate, up, down; empty: none
  std::function<void(int expert)> fetch;       // see ExpertWeights
  // Of a packed file: reads all of it.
  std::function<bool(Runtime& runtime, const Report& report)> verify;
  bool mapped = false;                 // paged in from a file by access
  bool quantized = false;              // when they were loaded, with these errors
  std::array<QuantError, 3> errors{};  // of gate, up, down
};

// The matrices of a layer that lies at `memory` as planned.
Placed place(const LayerPlan& plan, const std::byte* memory, std::shared_ptr<const void> owner);

// Weights that are mapped from a file: `fetch` asks the operating system for those of an expert.
void page_in(Placed& placed);

}  // namespace kt
