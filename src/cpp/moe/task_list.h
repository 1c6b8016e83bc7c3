// Tasks with an order between them, run by all threads without a barrier: a task that needs what others make
// waits for those, and only for those. Each is run by the team it was added for.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>
#include <vector>

#include "moe/runtime.h"

namespace kt {

class TaskList {
 public:
  using Body = std::function<void(index_t task, Arena& scratch)>;
  class Group;

  explicit TaskList(std::size_t teams = 1) : queues_(teams) {}

  // `count` tasks of a team that may run at the same time: body(task, scratch), task in [0, count). Tasks of
  // a team start in the order in which they were added. The group lives as long as the list.
  Group* add(const Label& label, std::size_t team, index_t count, Body body);

  // Runs every task; the first exception ends the list and is rethrown here.
  void run(Runtime::Lease& lease);

  // From a task, with its scratch: returns when all tasks of a group are done that was added before this
  // task's own. This ends: of all tasks that are not done, the one added first waits for none, and is the
  // next that its team starts.
  void wait(const Group* group, const Arena& scratch) const;

 private:
  void fail(std::exception_ptr error);

  struct Queue {
    std::deque<Group> groups;
    index_t tasks = 0;
  };
  std::vector<Queue> queues_;  // one a team
  const Runtime::Lease* lease_ = nullptr;
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

class TaskList::Group {
 public:
  Group(const Label& label, index_t first, index_t count, Body body)
      : label_(label), first_(first), left_(static_cast<int>(count)), body_(std::move(body)) {}

 private:
  friend TaskList;

  Label label_;
  index_t first_;
  std::atomic<int> left_;
  Body body_;
};

}  // namespace kt
