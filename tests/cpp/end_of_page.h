// Memory behind which nothing may be touched.
#pragma once

#include <doctest/doctest.h>
#include <sys/mman.h>

#include "base/view.h"

// n elements that end where a page ends, before one that may not be touched.
template <class T>
struct EndOfPage {
  explicit EndOfPage(int n) : bytes(kt::round_up(n * static_cast<kt::index_t>(sizeof(T)), kPage)) {
    map = static_cast<char*>(mmap(nullptr, static_cast<std::size_t>(bytes + kPage), PROT_READ | PROT_WRITE,
                                  MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(map != MAP_FAILED);
    REQUIRE(mprotect(map + bytes, kPage, PROT_NONE) == 0);
    data = reinterpret_cast<T*>(map + bytes) - n;
  }
  ~EndOfPage() { munmap(map, static_cast<std::size_t>(bytes + kPage)); }
  EndOfPage(const EndOfPage&) = delete;
  EndOfPage& operator=(const EndOfPage&) = delete;

  static constexpr kt::index_t kPage = 4096;
  kt::index_t bytes;
  char* map;
  T* data;
};
