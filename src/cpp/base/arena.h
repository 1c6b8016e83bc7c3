// Scratch memory that is kept between calls. Not thread-safe: one arena belongs to one thread at a time.
#pragma once

#include <cstddef>
#include <span>
#include <utility>
#include <vector>

#include "base/view.h"

namespace kt {

// Anonymous memory, 64-byte aligned, on huge pages where the kernel grants them. Zero at first. Of the given
// NUMA nodes, if there are any and the kernel allows it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes, std::span<const int> nodes = {});
  ~Buffer();
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;

  void* data() const { return data_; }
  std::size_t size() const noexcept { return size_; }
  bool refused() const noexcept { return refused_; }  // the nodes: it comes from any

 private:
  void* data_ = nullptr;
  std::size_t size_ = 0, mapped_ = 0;
  bool refused_ = false;
};

// Bump allocator. What `take` returned stays valid until the frame it was taken in ends, or `reset`; it holds
// whatever was there before.
class Arena {
 public:
  Arena() = default;
  // Its memory comes from these NUMA nodes, as a Buffer's does.
  explicit Arena(std::vector<int> nodes) : nodes_(std::move(nodes)) {}

  template <class T>
  T* take(index_t count) {
    return static_cast<T*>(take_bytes(static_cast<std::size_t>(count) * sizeof(T)));
  }
  // Allocates nothing and never fails: a task that could not start would keep others waiting.
  void reset() noexcept;
  std::size_t capacity() const noexcept;
  std::size_t peak() const { return peak_; }  // most bytes taken at once since `reset_peak`
  void reset_peak() { peak_ = 0; }

  // Gives back at its end what was taken during its life.
  class Frame {
   public:
    explicit Frame(Arena& arena)
        : arena_(arena), block_(arena.block_), used_(arena.used_), taken_(arena.taken_) {}
    ~Frame() { arena_.block_ = block_, arena_.used_ = used_, arena_.taken_ = taken_; }
    Frame(const Frame&) = delete;
    Frame& operator=(const Frame&) = delete;

   private:
    Arena& arena_;
    std::size_t block_, used_, taken_;
  };

 private:
  void* take_bytes(std::size_t bytes);

  std::vector<int> nodes_;
  std::vector<Buffer> blocks_;
  std::size_t together_ = 0;  // what the blocks held that the last `reset` gave back
  std::size_t block_ = 0;     // the one being filled
  std::size_t used_ = 0;      // of it
  std::size_t taken_ = 0;     // of all blocks, without what was left over where one did not suffice
  std::size_t peak_ = 0;
};

}  // namespace kt
