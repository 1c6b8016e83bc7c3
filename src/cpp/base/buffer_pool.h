// Memory of results, used again when they are gone: fresh pages cost more than writing them. Thread-safe.
#pragma once

#include <cstddef>
#include <list>
#include <mutex>

#include "base/arena.h"

namespace kt {

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
