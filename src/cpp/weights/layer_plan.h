// How the matrices of a layer lie in one piece of memory: expert by expert, each part of each matrix on a
// cache line. What a packed file holds behind its header.
#pragma once

#include <array>
#include <cstddef>

#include "base/projection.h"
#include "base/weight.h"

namespace kt {

struct LayerPlan {
  int num_experts = 0;
  index_t hidden = 0, intermediate = 0;
  std::array<WeightType, 3> types;
  bool on_pages = false;  // every expert begins on a page, so that it can be placed without its neighbours

  // A matrix without memory.
  MutableWeight shape(Projection p) const {
    const bool down = p == Projection::down;
    return {types[index_of(p)], down ? hidden : intermediate, down ? intermediate : hidden};
  }
  MutableWeight at(std::byte* memory, int expert, Projection p) const {
    std::byte* next = memory + expert * expert_bytes();
    for (const Projection before : projections) {
      if (before == p) break;
      next += padded_bytes(shape(before));
    }
    MutableWeight w = shape(p);
    const auto take = [&](index_t bytes) {
      std::byte* part = next;
      next += padded(bytes);
      return bytes > 0 ? part : nullptr;
    };
    w.codes = take(w.codes_bytes());
    w.scales = take(w.scales_bytes());
    w.zeros = take(w.zeros_bytes());
    w.global_scale = take(w.global_scale_bytes());
    return w;
  }
  // Of all experts: what they take where they lie, and what of it are weights and scales.
  index_t bytes() const { return num_experts * expert_bytes(); }
  index_t weight_bytes() const {
    index_t bytes = 0;
    for (const Projection p : projections) bytes += num_experts * shape(p).bytes();
    return bytes;
  }

  // From one expert to the next.
  index_t expert_bytes() const {
    index_t bytes = 0;
    for (const Projection p : projections) bytes += padded_bytes(shape(p));
    return on_pages ? round_up(bytes, 4096) : bytes;
  }

  bool operator==(const LayerPlan&) const = default;

 private:
  static index_t padded(index_t bytes) { return round_up(bytes, 64); }
  static index_t padded_bytes(const MutableWeight& w) {
    return padded(w.codes_bytes()) + padded(w.scales_bytes()) + padded(w.zeros_bytes()) +
           padded(w.global_scale_bytes());
  }
};

}  // namespace kt
