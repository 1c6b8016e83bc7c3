#include "base/arena.h"

#include <sys/mman.h>

#include <algorithm>
#include <new>
#include <utility>

#include "base/numa.h"
#include "base/split.h"

namespace kt {

namespace {

constexpr std::size_t kLine = 64;
constexpr std::size_t kSmallestBlock = std::size_t{1} << 20;

std::size_t rounded(std::size_t bytes, std::size_t to) { return (bytes + to - 1) / to * to; }

}  // namespace

Buffer::Buffer(std::size_t bytes, std::span<const int> nodes) : size_(bytes) {
  if (bytes == 0) return;
  // The kernel places mappings of 2 MiB and more on a huge-page boundary where it can.
  mapped_ = rounded(bytes, bytes >= kHugePage ? kHugePage : 4096);
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  if (bytes >= kHugePage) madvise(memory, mapped_, MADV_HUGEPAGE);  // advice: small pages are only slower
  refused_ = !place_memory(memory, mapped_, nodes);
  data_ = memory;
}

Buffer::~Buffer() {
  if (data_ != nullptr) munmap(data_, mapped_);
}

Buffer::Buffer(Buffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)),
      size_(std::exchange(other.size_, 0)),
      mapped_(std::exchange(other.mapped_, 0)),
      refused_(other.refused_) {}

Buffer& Buffer::operator=(Buffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  std::swap(mapped_, other.mapped_);
  std::swap(refused_, other.refused_);
  return *this;
}

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

}  // namespace kt
