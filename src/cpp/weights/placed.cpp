#include "weights/placed.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <utility>

namespace kt {

namespace {

void read_ahead(const std::byte* bytes, index_t count) {
  if (count == 0) return;
  static const auto page = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  const auto begin = reinterpret_cast<std::uintptr_t>(bytes), first = begin / page * page;
  ::madvise(reinterpret_cast<void*>(first), begin + static_cast<std::uintptr_t>(count) - first,
            MADV_WILLNEED);
}

}  // namespace

Placed place(std::span<const Piece> pieces, std::shared_ptr<const void> owner) {
  Placed placed;
  placed.memory = std::move(owner);
  for (const Piece& piece : pieces)
    for (const auto& [expert, projection] : matrices_of(piece.plan))
      placed.weights[index_of(projection)].push_back(frozen(piece.plan.at(piece.memory, expert, projection)));
  return placed;
}

void page_in(Placed& placed) {
  placed.mapped = true;
  placed.fetch = [weights = placed.weights](int expert) {
    for (const auto& stack : weights) {
      const Weight& w = stack[static_cast<std::size_t>(expert)];
      read_ahead(w.codes, w.codes_bytes());
      read_ahead(w.scales, w.scales_bytes());
      read_ahead(w.zeros, w.zeros_bytes());
      read_ahead(w.global_scale, w.global_scale_bytes());
    }
  };
}

}  // namespace kt
