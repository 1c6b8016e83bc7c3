// Memory of results, used again when they are gone: fresh pages cost more than writing them. Thread-safe.
#pragma once

#include <cstddef>
#include <mutex>
#include <vector>

#include "base/arena.h"

namespace kt {

class BufferPool {
 public:
  // At least so many bytes, holding whatever was there before. std::bad_alloc: there is no such memory.
  Buffer take(std::size_t bytes);
  void give_back(Buffer buffer) noexcept;
  std::size_t bytes();  // in use or kept

 private:
  // All that is kept is never more than what was in use at once, `most_`.
  std::mutex mutex_;
  std::vector<Buffer> free_;  // the first was given back first
  std::size_t free_bytes_ = 0, in_use_ = 0, most_ = 0;
};

}  // namespace kt
