#include "base/buffer_pool.h"

#include <algorithm>
#include <limits>
#include <new>
#include <utility>

namespace kt {

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
