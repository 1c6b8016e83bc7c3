#include "cpu/worker_pool.h"

#include <doctest/doctest.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

#include "cpu/sysfs.h"
#include "forks.h"

using namespace kt;
using kt::test::true_in_child;

namespace {

thread_local int allocations_left = -1;  // of this thread, before one fails; negative: none does

}  // namespace

void* operator new(std::size_t bytes) {
  if (allocations_left == 0) throw std::bad_alloc();
  if (allocations_left > 0) --allocations_left;
  if (void* memory = std::malloc(bytes == 0 ? 1 : bytes)) return memory;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }

namespace {

// Callers in a forked child beside its first thread. The thread sanitizer takes many new threads there for
// the parent's.
#ifdef __SANITIZE_THREAD__
constexpr int kOthers = 0;
#else
constexpr int kOthers = 3;
#endif

// Every task once, by a worker in range, never two at a time under one worker's number.
void check_loop(WorkerPool& pool, int tasks) {
  const auto claim = pool.claim();
  std::vector<std::atomic<int>> runs(static_cast<std::size_t>(tasks));
  std::vector<std::atomic<int>> inside(static_cast<std::size_t>(pool.threads()));
  std::atomic<int> wrong{0};
  pool.parallel_for(tasks, [&](int task, int worker) {
    if (worker < 0 || worker >= pool.threads()) ++wrong;
    if (inside[static_cast<std::size_t>(worker)]++ != 0) ++wrong;
    ++runs[static_cast<std::size_t>(task)];
    --inside[static_cast<std::size_t>(worker)];
  });
  CHECK(wrong == 0);
  for (const auto& n : runs) CHECK(n == 1);
}

}  // namespace

TEST_CASE("every task runs once") {
  for (const int threads : {1, 2, 5}) {
    WorkerPool pool(threads);
    for (const int tasks : {0, 1, 2, 3, 100, 5000}) check_loop(pool, tasks);
  }
}

TEST_CASE("nodes run their own tasks, and none of the others'") {
  WorkerPool pool({{2, {0, 1}}, {1, {1, 3}}, {3, {3, 4}}});
  CHECK(pool.threads() == 6);
  const auto claim = pool.claim();
  constexpr std::array kFirst{0, 2, 3, 6};  // worker of each node
  for (const std::array<int, 3>& tasks : {std::array{50, 0, 7}, {0, 0, 0}, {0, 1, 0}, {1000, 1000, 1000}}) {
    std::array<std::vector<std::atomic<int>>, 3> runs;
    for (std::size_t t = 0; t < 3; ++t) runs[t] = std::vector<std::atomic<int>>(std::size_t(tasks[t]));
    const int all = tasks[0] + tasks[1] + tasks[2];
    std::atomic<int> wrong{0};
    pool.parallel_for_nodes(tasks, [&](int node, int task, int worker) {
      const auto t = static_cast<std::size_t>(node);
      if (all > 1 && (worker < kFirst[t] || worker >= kFirst[t + 1])) ++wrong;
      ++runs[t][static_cast<std::size_t>(task)];
    });
    CHECK(wrong == 0);
    for (const auto& node : runs)
      for (const auto& n : node) CHECK(n == 1);
  }
}

TEST_CASE("many short loops") {
  WorkerPool pool(4);
  const auto claim = pool.claim();
  std::atomic<int> sum{0};
  for (int i = 0; i < 3000; ++i) pool.parallel_for(4, [&](int task, int) { sum += task; });
  CHECK(sum == 3000 * 6);
}

TEST_CASE("the first exception reaches the caller and the pool stays usable") {
  WorkerPool pool(3);
  {
    const auto claim = pool.claim();
    std::atomic<int> started{0};
    CHECK_THROWS_WITH_AS(pool.parallel_for(100000,
                                           [&](int, int) {
                                             ++started;
                                             throw std::runtime_error("no");
                                           }),
                         "no", std::runtime_error);
    CHECK(started < 100000);
  }
  check_loop(pool, 100);
}

TEST_CASE("a loop that finds no memory does not begin") {
  WorkerPool pool({{3, {0, 1}, affinity()}});
  const auto claim = pool.claim();
  for (int allocations = 0, failures = 1; failures == 1; ++allocations) {
    std::atomic<int> sum{0};
    failures = 0;
    allocations_left = allocations;
    try {
      pool.parallel_for(100, [&](int, int) { ++sum; });
    } catch (const std::bad_alloc&) {
      failures = 1;
    }
    allocations_left = -1;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // the time a loop that began would need
    CHECK(sum == (failures == 0 ? 100 : 0));
  }
}

TEST_CASE("between its tasks the caller is where it was before") {
  const std::vector<int> before = affinity();
  WorkerPool pool({{2, {0, 1}, {before.front()}}});
  const auto claim = pool.claim();
  int calls = 0, wrong = 0;
  std::atomic<int> pinned{0};
  const auto body = [&](int, int) { pinned += affinity() == std::vector{before.front()}; };
  const auto caller = std::this_thread::get_id();
  pool.parallel_for(1000, body, [&] {
    ++calls;
    if (std::this_thread::get_id() != caller || affinity() != before) ++wrong;
    std::thread([&] { wrong += affinity() != before; }).join();
  });
  CHECK(pinned == 1000);
  CHECK(calls > 0);
  CHECK(wrong == 0);
  CHECK(affinity() == before);

  const auto stop = [] { throw std::runtime_error("stop"); };
  CHECK_THROWS_WITH_AS(pool.parallel_for(1000, body, stop), "stop", std::runtime_error);
  CHECK(affinity() == before);
}

TEST_CASE("callers from several threads take turns") {
  WorkerPool pool(2);
  std::vector<std::thread> callers;
  std::atomic<int> sum{0}, inside{0}, wrong{0};
  for (int i = 0; i < 4; ++i)
    callers.emplace_back([&] {
      for (int round = 0; round < 50; ++round) {
        const auto claim = pool.claim();
        if (inside++ != 0) ++wrong;
        pool.parallel_for(16, [&](int, int) { ++sum; });
        --inside;
      }
    });
  for (std::thread& caller : callers) caller.join();
  CHECK(sum == 4 * 50 * 16);
  CHECK(wrong == 0);
}

TEST_CASE("a forked child has threads of its own") {
  WorkerPool pool(3);
  check_loop(pool, 10);
  CHECK(true_in_child([&] {
    std::atomic<int> sum{0};
    const auto work = [&] {
      const auto claim = pool.claim();
      pool.parallel_for(100, [&](int task, int) { sum += task; });
    };
    std::vector<std::thread> others;
    for (int i = 0; i < kOthers; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    return sum == (1 + kOthers) * 4950;
  }));
  check_loop(pool, 10);
}
