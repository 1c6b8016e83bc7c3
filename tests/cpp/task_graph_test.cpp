#include "moe/task_graph.h"

#include <doctest/doctest.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <memory>
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

void run(TaskGraph& graph, Runtime& runtime) {
  Runtime::Lease lease(runtime);
  graph.run(lease);
}

void sleep_ms(int ms) { std::this_thread::sleep_for(std::chrono::milliseconds(ms)); }

// Two nodes that are one.
Topology two_nodes() {
  Topology topology = read_topology();
  NumaNode& node = *std::ranges::find_if(topology.nodes, [](const NumaNode& n) { return !n.cpus.empty(); });
  return choose_nodes(topology, std::array{node.id, node.id});
}

// Groups of different sizes, empty ones too, of the nodes in turn; every task of one comes after two earlier
// groups, one of them named for all tasks and one for each, and checks that their plain, not atomic, results
// are there.
void check_chain(Runtime& runtime, int groups) {
  const std::vector<int> threads = Runtime::Lease(runtime).workers().threads;
  TaskGraph graph(threads);
  TaskGraph::Groups group;
  std::vector<std::vector<int>> done(static_cast<std::size_t>(groups));
  std::vector<std::vector<TaskGraph::Groups>> each(done.size());
  std::atomic<int> wrong{0};
  for (std::size_t g = 0; g < done.size(); ++g) {
    done[g].resize(g * 7 % 5);
    each[g].resize(done[g].size());
    TaskGraph::Groups all;
    if (g >= 1) all.push_back(group[g - 1]);
    if (g >= 4)
      for (TaskGraph::Groups& own : each[g]) own.push_back(group[g - 4]);
    const auto body = [&, g](index_t task, Arena& scratch) {
      scratch.take<int>(10)[9] = 1;
      for (const std::size_t before : {std::size_t{1}, std::size_t{4}}) {
        if (g < before) continue;
        for (const int runs : done[g - before])
          if (runs != 1) ++wrong;
      }
      ++done[g][static_cast<std::size_t>(task)];
    };
    group.push_back(
        graph.add(Stage::down, g % threads.size(), std::ssize(done[g]), {std::move(all), each[g]}, body));
  }
  run(graph, runtime);
  CHECK(wrong == 0);
  for (const auto& tasks : done)
    for (const int runs : tasks) CHECK(runs == 1);
}

}  // namespace

TEST_CASE("tasks find what they come after, whatever the number of threads and nodes") {
  const Deadline deadline;
  for (const int threads : kThreads) {
    CAPTURE(threads);
    Runtime runtime(threads, 1, "scalar");
    for (int round = 0; round < 100; ++round) check_chain(runtime, 40);
    Runtime two(threads, 2, "scalar", two_nodes());
    for (int round = 0; round < 100; ++round) check_chain(two, 40);
  }
}

TEST_CASE("an exception in one node ends the tasks of all, and the runtime stays usable") {
  const Deadline deadline;
  Runtime runtime(4, 2, "scalar", two_nodes());
  for (int round = 0; round < 50; ++round) {
    TaskGraph graph(std::array{2, 2});
    std::atomic<int> after{0};
    const auto* first = graph.add(Stage::down, 1, 3, {}, [&](index_t task, Arena&) {
      if (task == 1) throw std::runtime_error("no");
    });
    graph.add(Stage::down, 0, 100, first, [&](index_t, Arena&) { ++after; });
    CHECK_THROWS_WITH_AS(run(graph, runtime), "no", std::runtime_error);
    CHECK(after == 0);
    check_chain(runtime, 10);
  }
}

TEST_CASE("one thread runs tasks in the order in which they were added") {
  Runtime runtime(1, 1, "scalar");
  TaskGraph graph;
  std::vector<int> order;
  for (int g = 0; g < 3; ++g)
    graph.add(Stage::down, 0, 2, {},
              [&order, g](index_t task, Arena&) { order.push_back(2 * g + static_cast<int>(task)); });
  run(graph, runtime);
  CHECK(order == std::vector<int>{0, 1, 2, 3, 4, 5});
}

TEST_CASE("graphs without tasks, and groups that are empty") {
  const auto never = [](index_t, Arena&) { throw std::runtime_error("ran"); };
  for (const int threads : kThreads) {
    Runtime runtime(threads, 1, "scalar");
    TaskGraph none;
    run(none, runtime);
    TaskGraph empty;
    empty.add(Stage::down, 0, 0, {}, never);
    run(empty, runtime);
    TaskGraph one;
    int runs = 0;
    const auto* nothing = one.add(Stage::down, 0, 0, {}, never);
    one.add(Stage::down, 0, 1, nothing, [&](index_t, Arena&) { ++runs; });
    one.add(Stage::down, 0, 0, {}, never);
    run(one, runtime);
    CHECK(runs == 1);
  }
}

TEST_CASE("waiting longer than anyone spins") {
  const Deadline deadline;
  Runtime runtime(16, 1, "scalar");
  for (int round = 0; round < 5; ++round) {
    TaskGraph graph;
    int slow = 0;
    const auto* first = graph.add(Stage::down, 0, 1, {}, [&](index_t, Arena&) {
      sleep_ms(20);
      slow = 1;
    });
    std::atomic<int> seen{0};
    const auto* second = graph.add(Stage::down, 0, 15, first, [&](index_t, Arena&) { seen += slow; });
    graph.add(Stage::down, 0, 15, second, [&](index_t, Arena&) {
      if (seen != 15) seen = -1000;
    });
    run(graph, runtime);
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
      TaskGraph graph;
      std::atomic<int> after{0};
      const auto* good = graph.add(Stage::down, 0, 3, {}, [](index_t, Arena&) {});
      const auto* bad = graph.add(Stage::down, 0, 2, good, [&](index_t task, Arena&) {
        sleep_ms(patience);
        if (task == 1) throw std::runtime_error("no");
      });
      const auto* waiting = graph.add(Stage::down, 0, 20, bad, [&](index_t, Arena&) { ++after; });
      graph.add(Stage::down, 0, 20, waiting, [&](index_t, Arena&) { ++after; });
      CHECK_THROWS_WITH_AS(run(graph, runtime), "no", std::runtime_error);
      CHECK(after == 0);
      check_chain(runtime, 20);
    }
}

TEST_CASE("of several exceptions one reaches the caller") {
  const Deadline deadline;
  Runtime runtime(5, 1, "scalar");
  for (int round = 0; round < 50; ++round) {
    TaskGraph graph;
    const auto* all =
        graph.add(Stage::down, 0, 20, {}, [](index_t, Arena&) { throw std::runtime_error("no"); });
    graph.add(Stage::down, 0, 5, all, [](index_t, Arena&) {});
    CHECK_THROWS_WITH_AS(run(graph, runtime), "no", std::runtime_error);
  }
}

TEST_CASE("a profile has a span for each task, with its cost, and one where it waits") {
  Runtime runtime(1, 1, "scalar");
  const auto profile = std::make_shared<Profile>(runtime.first_shards(), 1, 1000);
  runtime.set_profile(profile);
  TaskGraph graph;
  const auto* first = graph.add(Stage::pack_weights, 0, 2, {}, [](index_t, Arena&) {});
  graph.add(
      {Stage::down, {0, 7, 9}}, 0, 3, first, [](index_t, Arena&) {},
      [](index_t task) { return Work{task, 10 * task, 100}; });
  run(graph, runtime);
  runtime.set_profile(nullptr);
  const Recorder& recorder = profile->recorder(0);
  CHECK(recorder.total(Stage::pack_weights).spans == 2);
  CHECK(recorder.total(Stage::wait).spans == 0);  // one thread never does
  const StageTotal& down = recorder.total(Stage::down);
  CHECK(down.spans == 3);
  CHECK(down.work.flops == 0 + 1 + 2);
  CHECK(down.work.local == 10 * (0 + 1 + 2));
  CHECK(down.work.remote == 300);
  CHECK(recorder.spans().back().args.expert == 7);
}
