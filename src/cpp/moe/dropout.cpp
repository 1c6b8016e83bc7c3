#include "moe/dropout.h"

namespace kt {

namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014), used as a hash of a counter.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

template <class T>
void drop_row(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, T* row) {
  const auto threshold = static_cast<std::uint64_t>(dropout.probability * 0x1p32);
  const std::uint64_t stream =
      static_cast<std::uint64_t>(slot) * projections.size() + static_cast<std::uint64_t>(projection);
  const std::uint64_t key = mix(dropout.seed + mix(stream + 1));
  for (index_t i = 0; i < n; ++i) {
    const std::uint64_t bits = mix(key + static_cast<std::uint64_t>(col + i) * 0x9e3779b97f4a7c15u) >> 32;
    if (bits < threshold) row[i] = T{};
  }
}

}  // namespace

void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, bf16_t* row) {
  drop_row(dropout, projection, slot, col, n, row);
}

void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, float* row) {
  drop_row(dropout, projection, slot, col, n, row);
}

}  // namespace kt
