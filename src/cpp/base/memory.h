// Memory: on NUMA nodes by system calls (no libnuma), buffers of it, scratch that is kept between calls, and
// the pool of results.
#pragma once

#include <cstddef>
#include <list>
#include <memory>
#include <mutex>
#include <span>
#include <utility>
#include <vector>

#include "base/view.h"

namespace kt {

inline constexpr std::size_t kHugePage = std::size_t{2} << 20;

// NUMA nodes by the numbers that the kernel gives them.

// Asks that pages of [memory, memory + bytes), whole ones of an anonymous mapping, come from `nodes` when
// they are first touched: from the only one while it has some, or from all in turn. No nodes: nothing is
// asked. False where the kernel refuses: the memory is as good, only further away.
bool place_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept;

// The same for pages that hold something: a copy on those nodes takes their place, all at once, so that who
// reads or forks meanwhile sees what was there; nobody may write. Not by migration, because huge pages would
// take neighbours along.
bool move_memory(void* memory, std::size_t bytes, std::span<const int> nodes) noexcept;

// The node of the page behind each address; -1 where there is no page yet, or the kernel does not tell.
std::vector<int> nodes_of(std::span<const void* const> addresses);

// Anonymous memory, 64-byte aligned, on huge pages where the kernel grants them. Zero at first. Of the given
// NUMA nodes, if there are any and the kernel allows it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(std::size_t bytes, std::span<const int> nodes = {});

  void* data() const { return data_.get(); }
  std::size_t size() const noexcept { return size_; }
  bool refused() const noexcept { return refused_; }  // the nodes: it comes from any

 private:
  struct Unmap {
    std::size_t bytes;
    void operator()(void* memory) const noexcept;
  };
  std::unique_ptr<void, Unmap> data_;
  std::size_t size_ = 0;
  bool refused_ = false;
};

// Bump allocator. Not thread-safe: one arena belongs to one thread at a time. What `take` returned stays
// valid until the frame it was taken in ends, or `reset`; it holds whatever was there before.
class Arena {
 public:
  Arena() = default;
  // Its memory comes from these NUMA nodes, as a Buffer's does.
  explicit Arena(std::vector<int> nodes) : nodes_(std::move(nodes)) {}

  template <class T>
  T* take(index_t count) {
    return static_cast<T*>(take_bytes(to_size(count) * sizeof(T)));
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

// Memory of results, used again when they are gone: fresh pages cost more than writing them. Thread-safe.
class BufferPool {
 public:
  // At least so many bytes, holding whatever was there before. std::bad_alloc: there is no such memory.
  Buffer take(std::size_t bytes);
  void give_back(Buffer buffer) noexcept;
  std::size_t bytes();  // in use and free

 private:
  // In use and free together are never more than was once in use at a time, `most_`.
  std::mutex mutex_;
  std::list<Buffer> free_;  // the first was given back first
  std::size_t free_bytes_ = 0, in_use_ = 0, most_ = 0;
};

}  // namespace kt
