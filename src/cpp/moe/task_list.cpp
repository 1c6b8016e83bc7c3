#include "moe/task_list.h"

#include <immintrin.h>

#include <algorithm>
#include <utility>

namespace kt {

namespace {

// Shorter than most tasks: whoever waits longer should leave the core to others.
constexpr int kSpins = 4000;

// Thrown through the body of a task that waits when another has failed.
struct Cancelled {};

}  // namespace

TaskList::Group* TaskList::add(const Label& label, std::size_t team, index_t count, Body body) {
  Queue& queue = queues_[team];
  queue.groups.emplace_back(label, queue.tasks, count, std::move(body));
  queue.tasks += count;
  return &queue.groups.back();
}

void TaskList::run(Runtime::Lease& lease) {
  lease_ = &lease;
  std::vector<index_t> tasks;
  for (const Queue& queue : queues_) tasks.push_back(queue.tasks);
  lease.parallel_for_teams(tasks, [&](std::size_t team, index_t task, Arena& scratch) {
    if (failed_) return;
    Group& group = *std::prev(std::ranges::upper_bound(queues_[team].groups, task, {}, &Group::first_));
    const Span span(lease.recorder(scratch), group.label_.stage, group.label_.about);
    try {
      group.body_(task - group.first_, scratch);
    } catch (const Cancelled&) {
      return;
    } catch (...) {
      return fail(std::current_exception());
    }
    // A locked instruction: it also makes visible what kernels stored past the caches.
    if (group.left_.fetch_sub(1, std::memory_order_acq_rel) == 1) group.left_.notify_all();
  });
  if (error_) std::rethrow_exception(error_);
}

void TaskList::wait(const Group* group, const Arena& scratch) const {
  const bool done = group->left_.load(std::memory_order_acquire) == 0;
  const Span span(done ? nullptr : lease_->recorder(scratch), Stage::wait);
  for (int spins = 0;; ++spins) {
    const int left = group->left_.load(std::memory_order_acquire);
    // Looked at second: it is set before `fail` empties the groups.
    if (failed_) throw Cancelled{};
    if (left == 0) return;
    if (spins < kSpins)
      _mm_pause();
    else
      group->left_.wait(left, std::memory_order_acquire);
  }
}

void TaskList::fail(std::exception_ptr error) {
  const std::lock_guard lock(error_mutex_);
  if (!error_) error_ = std::move(error);
  failed_ = true;
  for (Queue& queue : queues_)
    for (Group& group : queue.groups) {
      group.left_ = 0;
      group.left_.notify_all();
    }
}

}  // namespace kt
