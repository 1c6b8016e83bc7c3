// The scheduler: tasks, the node that runs each, and the tasks that each comes after. It knows nothing of
// what they compute. All threads run them without a barrier.
#pragma once

#include <array>
#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <span>
#include <vector>

#include "moe/runtime.h"

namespace kt {

class TaskGraph {
 public:
  class Group;  // tasks that were added together
  using Groups = std::vector<const Group*>;
  using Body = std::function<void(index_t task, Arena& scratch)>;
  using Cost = std::function<Work(index_t task)>;

  // What tasks wait for before they start: groups that were added before them.
  struct After {
    After(Groups groups = {}) : all(std::move(groups)) {}
    After(const Group* group) : all{group} {}
    After(Groups groups, std::span<const Groups> by_task) : all(std::move(groups)), each(by_task) {}

    Groups all;                         // every task
    std::span<const Groups> each = {};  // task i waits for each[i] too; or empty. It outlives the run.
  };

  // Of nodes with so many threads each; those of a node without threads go to the last one before it that has
  // some.
  explicit TaskGraph(std::span<const int> threads = std::array{1});

  // `count` tasks of a node that may run at the same time: body(task, scratch), task in [0, count). Tasks of
  // a node start in the order in which they were added. A profile records each under its label, with
  // cost(task) as what it does. The group lives as long as the graph.
  const Group* add(const Label& label, std::size_t node, index_t count, After after, Body body,
                   Cost cost = {});

  // Runs every task; the first exception ends the run and is rethrown here. It never blocks for ever: of all
  // tasks that are not done, the one added first waits for none, and is the next that its node starts.
  void run(Runtime::Lease& lease);

 private:
  // Both return whether to go on: false where another task has failed.
  bool wait_for(const Group& group, index_t task, Recorder* recorder) const;
  bool wait_for(const Group& group) const;
  void fail(std::exception_ptr error);

  struct Queue {
    std::deque<Group> groups;
    index_t tasks = 0;
  };
  std::vector<Queue> queues_;          // one a node
  std::vector<std::size_t> queue_of_;  // where the tasks of each node are
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

class TaskGraph::Group {
 public:
  Group(const Label& label, index_t first, index_t count, After after, Body body, Cost cost)
      : label_(label),
        first_(first),
        left_(to_int(count)),
        after_(std::move(after)),
        body_(std::move(body)),
        cost_(std::move(cost)) {}

 private:
  friend TaskGraph;

  bool done() const { return left_.load(std::memory_order_acquire) == 0; }

  Label label_;
  index_t first_;  // the number of its first task in the node's queue
  std::atomic<int> left_;
  After after_;
  Body body_;
  Cost cost_;
};

}  // namespace kt
