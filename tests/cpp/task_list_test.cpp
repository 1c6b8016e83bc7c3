#include "moe/task_list.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <stdexcept>
#include <thread>
#include <vector>

using namespace kt;

namespace {

constexpr int kThreads[] = {1, 2, 5, 16};

// A hang ends the test program, not the build's patience.
struct Deadline {
  Deadline() { alarm(120); }
  ~Deadline() { alarm(0); }
};

void run(TaskList& list, Runtime& runtime) {
  Runtime::Lease lease(runtime);
  list.run(lease);
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Two places on one node.
Topology two_places() {
  Topology topology = read_topology();
  NumaNode& node = *std::ranges::find_if(topology.nodes, [](const NumaNode& n) { return !n.cpus.empty(); });
  return choose_nodes(topology, std::array{node.id, node.id});
}

// Groups of different sizes, empty ones too, of the teams in turn; every task of one waits for two earlier
// groups and checks that their plain, not atomic, results are there.
void check_chain(Runtime& runtime, std::size_t teams, int groups) {
  TaskList list(teams);
  std::vector<const TaskList::Group*> group;
  std::vector<std::vector<int>> done(static_cast<std::size_t>(groups));
  std::atomic<int> wrong{0};
  for (std::size_t g = 0; g < done.size(); ++g) {
    done[g].resize(g * 7 % 5);
    const auto body = [&, g](index_t task, Arena& scratch) {
      scratch.take<int>(10)[9] = 1;
      for (const std::size_t before : {std::size_t{1}, std::size_t{4}}) {
        if (g < before) continue;
        list.wait(group[g - before], scratch);
        for (const int runs : done[g - before])
          if (runs != 1) ++wrong;
      }
      ++done[g][static_cast<std::size_t>(task)];
    };
    group.push_back(list.add(Stage::down, g % teams, std::ssize(done[g]), body));
  }
  run(list, runtime);
  CHECK(wrong == 0);
  for (const auto& tasks : done)
    for (const int runs : tasks) CHECK(runs == 1);
}

}  // namespace

TEST_CASE("tasks find what they waited for, whatever the number of threads and teams") {
  const Deadline deadline;
  for (const int threads : kThreads) {
    CAPTURE(threads);
    Runtime runtime(threads, 1, "scalar");
    for (int round = 0; round < 100; ++round) check_chain(runtime, 1, 40);
    if (threads < 2) continue;
    Runtime two(threads, 2, "scalar", two_places());
    for (int round = 0; round < 100; ++round) check_chain(two, 2, 40);
  }
}

TEST_CASE("an exception in one team ends the tasks of all, and the runtime stays usable") {
  const Deadline deadline;
  Runtime runtime(4, 2, "scalar", two_places());
  for (int round = 0; round < 50; ++round) {
    TaskList list(2);
    const auto* first = list.add(Stage::down, 1, 3, [&](index_t task, Arena&) {
      if (task == 1) throw std::runtime_error("no");
    });
    list.add(Stage::down, 0, 100, [&](index_t, Arena& scratch) { list.wait(first, scratch); });
    CHECK_THROWS_WITH_AS(run(list, runtime), "no", std::runtime_error);
    check_chain(runtime, 2, 10);
  }
}

TEST_CASE("one thread runs tasks in the order in which they were added") {
  Runtime runtime(1, 1, "scalar");
  TaskList list;
  std::vector<int> order;
  for (int g = 0; g < 3; ++g)
    list.add(Stage::down, 0, 2,
             [&order, g](index_t task, Arena&) { order.push_back(2 * g + static_cast<int>(task)); });
  run(list, runtime);
  CHECK(order == std::vector<int>{0, 1, 2, 3, 4, 5});
}

TEST_CASE("lists without tasks, and groups that are empty") {
  for (const int threads : kThreads) {
    Runtime runtime(threads, 1, "scalar");
    TaskList none;
    run(none, runtime);
    TaskList empty;
    const auto* nothing =
        empty.add(Stage::down, 0, 0, [](index_t, Arena&) { throw std::runtime_error("ran"); });
    run(empty, runtime);
    TaskList one;
    nothing = one.add(Stage::down, 0, 0, [](index_t, Arena&) { throw std::runtime_error("ran"); });
    int runs = 0;
    one.add(Stage::down, 0, 1, [&](index_t, Arena& scratch) {
      one.wait(nothing, scratch);
      ++runs;
    });
    one.add(Stage::down, 0, 0, [](index_t, Arena&) { throw std::runtime_error("ran"); });
    run(one, runtime);
    CHECK(runs == 1);
  }
}

TEST_CASE("waiting longer than anyone spins") {
  const Deadline deadline;
  Runtime runtime(16, 1, "scalar");
  for (int round = 0; round < 5; ++round) {
    TaskList list;
    int slow = 0;
    const auto* first = list.add(Stage::down, 0, 1, [&](index_t, Arena&) {
      sleep_ms(20);
      slow = 1;
    });
    std::atomic<int> seen{0};
    const auto* second = list.add(Stage::down, 0, 15, [&](index_t, Arena& scratch) {
      list.wait(first, scratch);
      seen += slow;
    });
    list.add(Stage::down, 0, 15, [&](index_t, Arena& scratch) {
      list.wait(second, scratch);
      if (seen != 15) seen = -1000;
    });
    run(list, runtime);
    CHECK(seen == 15);
  }
}

TEST_CASE("an exception reaches the caller, ends those that wait, and the runtime stays usable") {
  const Deadline deadline;
  for (const int threads : kThreads)
    for (const int patience : {0, 10}) {  // the others still spin, or sleep already
      CAPTURE(threads);
      CAPTURE(patience);
      Runtime runtime(threads, 1, "scalar");
      TaskList list;
      std::atomic<int> after{0};
      const auto* good = list.add(Stage::down, 0, 3, [](index_t, Arena&) {});
      const auto* bad = list.add(Stage::down, 0, 2, [&, good](index_t task, Arena& scratch) {
        list.wait(good, scratch);
        sleep_ms(patience);
        if (task == 1) throw std::runtime_error("no");
      });
      const auto* waiting = list.add(Stage::down, 0, 20, [&, bad](index_t, Arena& scratch) {
        list.wait(bad, scratch);
        ++after;
      });
      list.add(Stage::down, 0, 20, [&, waiting](index_t, Arena& scratch) {
        list.wait(waiting, scratch);
        ++after;
      });
      CHECK_THROWS_WITH_AS(run(list, runtime), "no", std::runtime_error);
      CHECK(after == 0);
      check_chain(runtime, 1, 20);
    }
}

TEST_CASE("of several exceptions one reaches the caller") {
  const Deadline deadline;
  Runtime runtime(5, 1, "scalar");
  for (int round = 0; round < 50; ++round) {
    TaskList list;
    const auto* all = list.add(Stage::down, 0, 20, [](index_t, Arena&) { throw std::runtime_error("no"); });
    list.add(Stage::down, 0, 5, [&, all](index_t, Arena& scratch) { list.wait(all, scratch); });
    CHECK_THROWS_WITH_AS(run(list, runtime), "no", std::runtime_error);
  }
}
