#include "base/memory.h"

#include <linux/mempolicy.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

namespace kt {

namespace {

constexpr std::size_t kBits = 8 * sizeof(unsigned long);

// An mremap that fails may have unmapped its target.
void put_back(void* memory, const void* copy, std::size_t bytes) noexcept {
  constexpr int kFixed = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
  if (mmap(memory, bytes, PROT_READ | PROT_WRITE, kFixed, -1, 0) == MAP_FAILED) std::abort();
  std::memcpy(memory, copy, bytes);
}

constexpr std::size_t kLine = 64;
constexpr std::size_t kSmallestBlock = std::size_t{1} << 20;

std::size_t rounded(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

bool place_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept {
  if (nodes.empty() || bytes == 0) return true;
  unsigned long mask[1024 / kBits] = {};
  for (const int node : nodes) {
    if (node < 0 || to_size(node) >= 1024) return false;
    mask[to_size(node) / kBits] |= 1UL << to_size(node) % kBits;
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

Buffer::Buffer(std::size_t bytes, std::span<const int> nodes) : size_(bytes) {
  if (bytes == 0) return;
  // The kernel places mappings of 2 MiB and more on a huge-page boundary where it can.
  const std::size_t mapped = rounded(bytes, bytes >= kHugePage ? kHugePage : 4096);
  void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  data_ = std::unique_ptr<void, Unmap>(memory, Unmap{mapped});
  if (bytes >= kHugePage) madvise(memory, mapped, MADV_HUGEPAGE);  // advice: small pages are only slower
  refused_ = !place_memory(memory, mapped, nodes);
}

void Buffer::Unmap::operator()(void* memory) const noexcept { munmap(memory, bytes); }

void* Arena::take_bytes(std::size_t bytes) {
  bytes = rounded(bytes, kLine);
  while (block_ < blocks_.size() && used_ + bytes > blocks_[block_].size()) {
    ++block_;
    used_ = 0;
  }
  if (block_ == blocks_.size())
    blocks_.emplace_back(std::max({bytes, capacity(), together_, kSmallestBlock}), nodes_);
  void* memory = static_cast<char*>(blocks_[block_].data()) + used_;
  used_ += bytes;
  taken_ += bytes;
  peak_ = std::max(peak_, taken_);
  return memory;
}

void Arena::reset() noexcept {
  block_ = used_ = taken_ = 0;
  if (blocks_.size() > 1) {  // next time all of it fits one block
    together_ = capacity();
    blocks_.clear();
  }
}

std::size_t Arena::capacity() const noexcept {
  std::size_t total = 0;
  for (const Buffer& block : blocks_) total += block.size();
  return total;
}

Buffer BufferPool::take(std::size_t bytes) {
  std::list<Buffer> surplus;  // unmapped when nobody waits for the lock
  {
    const std::lock_guard lock(mutex_);
    constexpr std::size_t kUnfit = std::numeric_limits<std::size_t>::max();
    // Of what fits: up to a quarter too large, for batches differ a little in their routes.
    const auto waste = [bytes](const Buffer& buffer) {
      const std::size_t size = buffer.size();
      return size < bytes || size - bytes > bytes / 4 ? kUnfit : size - bytes;
    };
    const auto best = std::ranges::min_element(free_, {}, waste);
    if (best != free_.end() && waste(*best) != kUnfit) {
      Buffer buffer = std::move(*best);
      free_.erase(best);
      free_bytes_ -= buffer.size();
      in_use_ += buffer.size();
      return buffer;
    }
    const std::size_t most = std::max(most_, in_use_ + bytes);
    auto kept = free_.begin();
    for (; kept != free_.end() && in_use_ + bytes + free_bytes_ > most; ++kept) free_bytes_ -= kept->size();
    surplus.splice(surplus.begin(), free_, free_.begin(), kept);
  }
  surplus.clear();
  Buffer buffer(bytes);
  const std::lock_guard lock(mutex_);
  in_use_ += bytes;
  most_ = std::max(most_, in_use_);  // only now: there may have been no such memory
  return buffer;
}

std::size_t BufferPool::bytes() {
  const std::lock_guard lock(mutex_);
  return in_use_ + free_bytes_;
}

void BufferPool::give_back(Buffer buffer) noexcept {
  const std::lock_guard lock(mutex_);
  in_use_ -= buffer.size();
  const std::size_t bytes = buffer.size();
  try {
    free_.push_back(std::move(buffer));
    free_bytes_ += bytes;
  } catch (const std::bad_alloc&) {  // then it is unmapped here
  }
}

}  // namespace kt
