// The split rule: how n things are cut into contiguous parts. One pure function for loader, layer and loops.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include "base/view.h"

namespace kt {

struct Range {
  index_t begin = 0, end = 0;
  index_t size() const { return end - begin; }
};

constexpr index_t ceil_div(index_t n, index_t d) { return (n + d - 1) / d; }
constexpr index_t round_up(index_t n, index_t d) { return ceil_div(n, d) * d; }

// Part `part` of [0, n) cut into `parts`, every cut on a multiple of `align`. Part sizes differ by at most
// one `align` (the last by its tail); with too few blocks the trailing parts are empty.
constexpr Range split(index_t n, index_t parts, index_t part, index_t align = 1) {
  const index_t blocks = ceil_div(n, align);
  const index_t each = blocks / parts, extra = blocks % parts;
  const index_t first = part * each + std::min(part, extra);
  const index_t last = first + each + (part < extra ? 1 : 0);
  return {std::min(n, first * align), std::min(n, last * align)};
}

// [0, n) cut into a part for each weight, as large as its share of all weights, every cut on a multiple of
// `align`. With too few blocks some parts are empty. The weights are not negative, and their sum is not 0.
inline std::vector<Range> split_by(index_t n, std::span<const index_t> weights, index_t align) {
  const index_t blocks = ceil_div(n, align);
  index_t all = 0, before = 0;
  for (const index_t w : weights) all += w;
  std::vector<Range> parts;
  for (const index_t w : weights) {
    const auto cut = [&](index_t upto) { return std::min(n, (blocks * upto + all / 2) / all * align); };
    parts.push_back({cut(before), cut(before + w)});
    before += w;
  }
  return parts;
}

}  // namespace kt
