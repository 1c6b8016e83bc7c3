// Tasks with an order between them, run by all threads without a barrier: a task that needs what others make
// waits for those, and only for those.
#pragma once

#include <atomic>
#include <deque>
#include <exception>
#include <functional>
#include <mutex>

#include "moe/runtime.h"

namespace kt {

class TaskList {
 public:
  using Body = std::function<void(index_t task, Arena& scratch)>;
  class Group;

  // `count` tasks that may run at the same time: body(task, scratch), task in [0, count). Tasks start in the
  // order in which they were added. The group lives as long as the list.
  Group* add(index_t count, Body body);

  // Runs every task; the first exception ends the list and is rethrown here.
  void run(Runtime::Lease& lease);

  // From a task: returns when all tasks of a group are done that was added before this task's own. Those have
  // started already, so this ends.
  void wait(const Group* group) const;

 private:
  void fail(std::exception_ptr error);

  std::deque<Group> groups_;
  index_t tasks_ = 0;
  std::atomic<bool> failed_{false};
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

class TaskList::Group {
 public:
  Group(index_t first, index_t count, Body body)
      : first_(first), left_(static_cast<int>(count)), body_(std::move(body)) {}

 private:
  friend TaskList;

  index_t first_;
  std::atomic<int> left_;
  Body body_;
};

}  // namespace kt
