// A pool of threads for loops over independent tasks. The calling thread works too.
// Owns its threads and nothing else. A task starts no loop of its own.
#pragma once

#include <functional>
#include <mutex>
#include <span>
#include <vector>

#include "base/per_process.h"
#include "cpu/layout.h"

namespace kt {

class WorkerPool {
 public:
  // Workers are numbered node by node; the calling thread is number 0. Threads of a node that has CPUs run on
  // those alone, the calling one during a loop, if the operating system lets them. IoError when it refuses to
  // start one.
  explicit WorkerPool(std::vector<Node> nodes);
  explicit WorkerPool(int threads) : WorkerPool(std::vector<Node>{{threads, {0, 1}}}) {}
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int threads() const { return threads_; }
  std::span<const Node> nodes() const { return nodes_; }

  // The pool for one caller at a time. Of the thread that made it.
  class Claim {
   public:
    explicit Claim(std::mutex& claimed);
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;

   private:
    const void* outer_;  // another pool's that the thread holds
    std::unique_lock<std::mutex> lock_;
  };
  // In a forked child, where the threads of the parent do not exist, they are started anew.
  // std::runtime_error if this thread holds the pool already: it would wait for itself.
  [[nodiscard]] Claim claim();

  // Runs body(task, worker) for every task in [0, tasks), worker in [0, threads()), each worker one task at a
  // time; returns when all are done. Tasks start in order, so put the longest first. The first exception of a
  // task ends the loop early and is rethrown here. The caller holds the claim.
  // `between`, where it is given, is called on the calling thread after each task of its own, on the CPUs
  // that it had before: it may call strangers, whose threads inherit them. What it throws is as a task's.
  void parallel_for(int tasks, const std::function<void(int task, int worker)>& body,
                    const std::function<void()>& between = {});

  // The same with a loop for each node, over tasks[node] tasks that only its own threads run: none
  // for a node without threads. The first node has some.
  using NodeBody = std::function<void(int node, int task, int worker)>;
  void parallel_for_nodes(std::span<const int> tasks, const NodeBody& body);

 private:
  struct Crew;
  // `share`: all threads take tasks of the first and only loop.
  void run(std::span<const int> tasks, bool share, const NodeBody& body,
           const std::function<void()>& between);

  std::vector<Node> nodes_;
  int threads_;
  PerProcess<Crew> crew_;
};

}  // namespace kt
