#include <doctest/doctest.h>

#include <atomic>
#include <cstring>
#include <locale>
#include <mutex>
#include <new>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "base/per_process.h"
#include "base/view.h"
#include "forks.h"

using namespace kt;
using kt::test::true_in_children;

TEST_CASE("messages have the same numbers in every locale") {
  struct Grouped : std::numpunct<char> {
    char do_thousands_sep() const override { return ','; }
    std::string do_grouping() const override { return "\3"; }
    char do_decimal_point() const override { return ';'; }
  };
  const std::locale before = std::locale::global(std::locale(std::locale::classic(), new Grouped));
  const std::string text = message("{} of {}", 12345, 0.5);
  std::locale::global(before);
  CHECK(text == "12345 of 0.5");
}

TEST_CASE("split: parts cover everything once, in order, cut on the alignment, sizes even") {
  for (const index_t n : {0, 1, 7, 12, 64, 100, 767, 768})
    for (const index_t parts : {1, 2, 3, 5, 16, 40})
      for (const index_t align : {1, 12, 32}) {
        CAPTURE(n);
        CAPTURE(parts);
        CAPTURE(align);
        index_t next = 0, largest = 0, smallest = n;
        for (index_t part = 0; part < parts; ++part) {
          const Range range = split(n, parts, part, align);
          CHECK(range.begin == next);
          CHECK(range.size() >= 0);
          if (range.begin < n) CHECK(range.begin % align == 0);
          largest = std::max(largest, range.size());
          if (part + 1 < parts && range.end < n) smallest = std::min(smallest, range.size());
          next = range.end;
        }
        CHECK(next == n);
        if (smallest < largest) CHECK(largest - smallest <= align);
      }
}

TEST_CASE("arena: memory is aligned, distinct, usable, and kept between calls") {
  Arena arena;
  std::set<char*> seen;
  for (const index_t n : {1, 64, 100, 5'000'000, 3}) {
    char* memory = arena.take<char>(n);
    CHECK(reinterpret_cast<std::uintptr_t>(memory) % 64 == 0);
    CHECK(seen.insert(memory).second);
    std::memset(memory, 1, static_cast<std::size_t>(n));
  }
  arena.reset();  // gives several blocks back, and allocates nothing yet
  CHECK(arena.capacity() == 0);
  for (int call = 0; call < 3; ++call, arena.reset()) {
    arena.take<char>(1);
    const std::size_t kept = arena.capacity();
    CHECK(kept >= 5'000'168);
    for (const index_t n : {64, 100, 5'000'000, 3}) arena.take<char>(n);
    CHECK(arena.capacity() == kept);
  }
}

TEST_CASE("arena frame: what was taken inside is taken again, what was outside stays") {
  Arena arena;
  int* outside = arena.take<int>(4);
  *outside = 7;
  int* first = nullptr;
  {
    const Arena::Frame frame(arena);
    first = arena.take<int>(4);
    arena.take<char>(10'000'000);  // a block of its own
  }
  CHECK(arena.take<int>(4) == first);
  CHECK(*outside == 7);
}

TEST_CASE("arena peak: the most in use at once, kept over a reset") {
  Arena arena;
  arena.take<char>(64);
  for (int i = 0; i < 3; ++i) {
    const Arena::Frame frame(arena);
    arena.take<char>(100'000);
  }
  arena.take<char>(1);
  CHECK(arena.peak() == 64 + 100'032);
  arena.reset();
  arena.take<char>(1000);
  CHECK(arena.peak() == 64 + 100'032);
  arena.reset_peak();
  arena.take<char>(10'000'000);  // does not fit behind what was taken
  CHECK(arena.peak() == 1024 + 10'000'000);
}

TEST_CASE("a moved buffer has one owner") {
  Buffer a(4096);
  static_cast<char*>(a.data())[4095] = 1;
  Buffer b(std::move(a));
  CHECK(a.data() == nullptr);
  CHECK(static_cast<char*>(b.data())[4095] == 1);
  b = Buffer();
  CHECK(b.size() == 0);
}

TEST_CASE("buffer pool: what was given back is taken again by who wants nearly as much") {
  BufferPool pool;
  pool.give_back(pool.take(10'000'000));  // so that there is room for all of these
  Buffer a = pool.take(1'000'000);
  void* const memory = a.data();
  pool.give_back(std::move(a));
  Buffer larger = pool.take(1'000'001), small = pool.take(700'000);
  CHECK(larger.data() != memory);
  CHECK(small.data() != memory);
  pool.give_back(std::move(larger));
  pool.give_back(std::move(small));

  Buffer b = pool.take(1'000'000);
  std::memset(b.data(), 1, b.size());
  pool.give_back(std::move(b));
  Buffer c = pool.take(900'000);
  CHECK(c.size() >= 900'000);
  CHECK(static_cast<char*>(c.data())[899'999] == 1);  // not fresh
}

TEST_CASE("buffer pool: it keeps no more than was in use at once") {
  BufferPool pool;
  for (const std::size_t bytes : {1'000'000, 3'000'000, 500'000, 2'000'000, 100'000}) {
    std::vector<Buffer> both;
    for (int i = 0; i < 2; ++i) both.push_back(pool.take(bytes));
    CHECK(pool.bytes() <= 6'000'000);
    for (Buffer& buffer : both) pool.give_back(std::move(buffer));
    CHECK(pool.bytes() <= 6'000'000);
  }
  CHECK_THROWS_AS(pool.take(std::size_t{1} << 60), std::bad_alloc);
  for (const std::size_t bytes : {1'000'000, 2'000'000, 3'000'000, 4'000'000}) {
    pool.give_back(pool.take(bytes));
    CHECK(pool.bytes() <= 6'000'000);  // what could not be had was never in use
  }
}

TEST_CASE("buffer pool: threads share it") {
  BufferPool pool;
  std::atomic<int> shared = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t)
    threads.emplace_back([&pool, &shared, t] {
      for (std::size_t i = 0; i < 200; ++i) {
        Buffer buffer = pool.take(10'000 + i % 7 * 5'000);
        std::memset(buffer.data(), t, buffer.size());
        const auto* bytes = static_cast<const char*>(buffer.data());
        for (std::size_t j = 0; j < buffer.size(); j += 999)
          if (bytes[j] != t) ++shared;
        pool.give_back(std::move(buffer));
      }
    });
  for (std::thread& thread : threads) thread.join();
  CHECK(shared == 0);
}

TEST_CASE("format fills holes in order") {
  CHECK(message("{} of {}", 3, "x") == "3 of x");
  CHECK(message("{} left", 1, 2) == "1 left");
  CHECK_THROWS_WITH_AS([] { KT_CHECK(1 > 2, "r is {}", 0); }(), "r is 0", ValueError);
}

TEST_CASE("a forked child has a state of its own, whatever another thread did with the parent's") {
  struct State {
    std::mutex mutex;
    int value = 1;
  };
  const PerProcess<State> state;
  CHECK(state.get().value == 1);
  CHECK(&state.get() == &state.get());
  const auto set = [&](int value) {
    const std::lock_guard lock(state.get().mutex);
    return std::exchange(state.get().value, value);
  };
  CHECK(true_in_children([&] { return set(3) == 1 && set(1) == 3; }, [&] { set(2); }));
}
