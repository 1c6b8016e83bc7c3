// A pool of threads for loops over independent tasks. The calling thread works too.
// Owns its threads and nothing else. A task starts no loop of its own.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>

namespace kt {

class WorkerPool {
 public:
  // `threads` >= 1, the calling one included. IoError when the operating system refuses to start one.
  explicit WorkerPool(int threads);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  int threads() const { return threads_; }

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
  void parallel_for(int tasks, const std::function<void(int task, int worker)>& body);

 private:
  struct Team;
  Team& team();

  int threads_;
  std::atomic<Team*> team_;
};

}  // namespace kt
