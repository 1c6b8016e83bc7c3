#include "moe/task_graph.h"

#include <algorithm>
#include <utility>

#include "cpu/processor.h"

namespace kt {

namespace {

// Spinning this often takes as long as short tasks do. A thread that waits longer leaves the core to others.
constexpr int kSpins = 4000;

}  // namespace

TaskGraph::TaskGraph(std::span<const int> threads) : queues_(threads.size()) {
  std::size_t served_by = 0;
  for (std::size_t node = 0; node < threads.size(); ++node) {
    if (threads[node] > 0) served_by = node;
    queue_of_.push_back(served_by);
  }
}

const TaskGraph::Group* TaskGraph::add(const Label& label, std::size_t node, index_t count, After after,
                                       Body body, Cost cost) {
  Queue& queue = queues_[queue_of_[node]];
  queue.groups.emplace_back(label, queue.tasks, count, std::move(after), std::move(body), std::move(cost));
  queue.tasks += count;
  return &queue.groups.back();
}

void TaskGraph::run(Runtime::Lease& lease) {
  std::vector<index_t> tasks;
  for (const Queue& queue : queues_) tasks.push_back(queue.tasks);
  lease.parallel_for_nodes(tasks, [&](std::size_t node, index_t task, Arena& scratch) {
    Group& group = *std::prev(std::ranges::upper_bound(queues_[node].groups, task, {}, &Group::first_));
    const index_t number = task - group.first_;
    Recorder* recorder = lease.recorder(scratch);
    if (!wait_for(group, number, recorder)) return;
    Span span(recorder, group.label_.stage, group.label_.args);
    try {
      if (recorder != nullptr && group.cost_) span.count(group.cost_(number));
      group.body_(number, scratch);
    } catch (...) {
      return fail(std::current_exception());
    }
    // A locked instruction: it also makes visible what kernels stored past the caches.
    if (group.left_.fetch_sub(1, std::memory_order_acq_rel) == 1) group.left_.notify_all();
  });
  if (error_) std::rethrow_exception(error_);
}

bool TaskGraph::wait_for(const Group& group, index_t task, Recorder* recorder) const {
  const auto& [all, each] = group.after_;
  const std::span<const Group* const> own =
      each.empty() ? std::span<const Group* const>() : each[to_size(task)];
  const auto done = [](const Group* before) { return before->done(); };
  const bool waits =
      recorder != nullptr && !(std::ranges::all_of(all, done) && std::ranges::all_of(own, done));
  const Span span(waits ? recorder : nullptr, Stage::wait, {group.label_.args.shard});
  for (const auto groups : {std::span<const Group* const>(all), own})
    for (const Group* before : groups)
      if (!wait_for(*before)) return false;
  return !failed_;
}

bool TaskGraph::wait_for(const Group& group) const {
  for (int spins = 0;; ++spins) {
    const int left = group.left_.load(std::memory_order_acquire);
    // Looked at second: it is set before `fail` empties the groups.
    if (failed_) return false;
    if (left == 0) return true;
    if (spins < kSpins)
      spin();
    else
      group.left_.wait(left, std::memory_order_acquire);
  }
}

void TaskGraph::fail(std::exception_ptr error) {
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
