#include "base/numa.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace kt {

namespace {

constexpr std::size_t kBits = 8 * sizeof(unsigned long);

// An mremap that fails may have unmapped its target.
void put_back(void* memory, const void* copy, std::size_t bytes) noexcept {
  constexpr int kFixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  if (mmap(memory, bytes, PROT_READ | PROT_WRITE, kFixed, -1, 0) == MAP_FAILED) std::abort();
  std::memcpy(memory, copy, bytes);
}

}  // namespace

bool place_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept {
  if (nodes.empty() || bytes == 0) return true;
  unsigned long mask[1024 / kBits] = {};
  for (const int node : nodes) {
    if (node < 0 || static_cast<std::size_t>(node) >= 1024) return false;
    mask[static_cast<std::size_t>(node) / kBits] |= 1UL << static_cast<std::size_t>(node) % kBits;
  }
  const int policy = nodes.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE;
  // One bit more than there are: the kernel takes the number for exclusive.
  return ::syscall(SYS_mbind, memory, bytes, policy, mask, 1024UL + 1, 0) == 0;
}

bool move_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept {
  if (nodes.empty() || bytes == 0) return true;
  // The copy lies as the memory does within huge pages, or these would be taken apart.
  void* mapped = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return false;
  auto* const begin = static_cast<std::byte*>(mapped);
  const std::size_t skipped =
      (reinterpret_cast<std::uintptr_t>(memory) - reinterpret_cast<std::uintptr_t>(mapped)) % kHugePage;
  std::byte* const copy = begin + skipped;
  bool moved = place_memory(copy, bytes, nodes);
  if (moved) {
    madvise(copy, bytes, MADV_HUGEPAGE);
    std::memcpy(copy, memory, bytes);
    moved = mremap(copy, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, memory) != MAP_FAILED;
    if (!moved) put_back(memory, copy, bytes);
  }
  if (!moved) munmap(copy, bytes);
  if (skipped > 0) munmap(begin, skipped);
  munmap(copy + bytes, kHugePage - skipped);
  return moved;
}

std::vector<int> nodes_of(std::span<const void* const> addresses) {
  std::vector<void*> pages;
  for (const void* address : addresses) pages.push_back(const_cast<void*>(address));
  std::vector<int> nodes(pages.size(), -1);
  if (::syscall(SYS_move_pages, 0, pages.size(), pages.data(), nullptr, nodes.data(), 0) != 0)
    std::ranges::fill(nodes, -1);
  for (int& node : nodes) node = std::max(node, -1);  // other errors of a page
  return nodes;
}

}  // namespace kt
