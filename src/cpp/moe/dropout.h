// LoRA dropout without stored masks: whether an element is dropped is a function of its place and the seed,
// so backward sees the mask of forward, whatever the threads and blocks.
#pragma once

#include <cstdint>

#include "base/projection.h"
#include "base/view.h"

namespace kt {

struct Dropout {
  // Of dropping, in [0, 1). Kept elements are scaled by 1 / (1 - probability), through the LoRA scaling. A
  // double, because a float just below 1 may be 1.
  double probability = 0.0;
  std::uint64_t seed = 0;

  bool active() const { return probability > 0.0; }
};

// Zeroes the dropped ones among the inputs [col, col + n) of a projection's LoRA A product for one route
// (its place in topk_ids).
void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, bf16_t* row);
void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, float* row);

}  // namespace kt
