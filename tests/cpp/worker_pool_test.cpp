#include "cpu/worker_pool.h"

#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <stdexcept>
#include <thread>
#include <vector>

using namespace kt;

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

TEST_CASE("teams run their own tasks, and none of the others'") {
  WorkerPool pool({{2, {0, 1}}, {1, {1, 3}}, {3, {3, 4}}});
  CHECK(pool.threads() == 6);
  const auto claim = pool.claim();
  constexpr std::array kFirst{0, 2, 3, 6};  // worker of each team
  for (const std::array<int, 3>& tasks : {std::array{50, 0, 7}, {0, 0, 0}, {0, 1, 0}, {1000, 1000, 1000}}) {
    std::array<std::vector<std::atomic<int>>, 3> runs;
    for (std::size_t t = 0; t < 3; ++t) runs[t] = std::vector<std::atomic<int>>(std::size_t(tasks[t]));
    const int all = tasks[0] + tasks[1] + tasks[2];
    std::atomic<int> wrong{0};
    pool.parallel_for_teams(tasks, [&](int team, int task, int worker) {
      const auto t = static_cast<std::size_t>(team);
      if (all > 1 && (worker < kFirst[t] || worker >= kFirst[t + 1])) ++wrong;
      ++runs[t][static_cast<std::size_t>(task)];
    });
    CHECK(wrong == 0);
    for (const auto& team : runs)
      for (const auto& n : team) CHECK(n == 1);
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
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);  // a hang ends the child, not the test
    std::atomic<int> sum{0};
    const auto work = [&] {
      const auto claim = pool.claim();
      pool.parallel_for(100, [&](int task, int) { sum += task; });
    };
    std::vector<std::thread> others;
    for (int i = 0; i < kOthers; ++i) others.emplace_back(work);
    work();
    for (std::thread& other : others) other.join();
    _exit(sum == (1 + kOthers) * 4950 ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
  check_loop(pool, 10);
}
