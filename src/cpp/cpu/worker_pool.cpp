#include "cpu/worker_pool.h"

#include <immintrin.h>
#include <unistd.h>

#include <atomic>
#include <cassert>
#include <exception>
#include <memory>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"

namespace kt {

namespace {

// Long enough to bridge the gap between two loops of one layer, short enough to cost an idle core nothing.
constexpr int kSpins = 2000;

[[maybe_unused]] thread_local bool inside_task = false;
thread_local const void* mine = nullptr;  // what this thread has claimed last

// Spin briefly, then sleep on a futex, until `word` is no longer `old`.
void wait_while(const std::atomic<unsigned>& word, unsigned old) {
  for (int i = 0; i < kSpins; ++i) {
    if (word.load(std::memory_order_acquire) != old) return;
    _mm_pause();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

}  // namespace

struct WorkerPool::Team {
  explicit Team(int threads) : process(getpid()) {
    try {
      for (int worker = 1; worker < threads; ++worker)
        members.emplace_back([this, worker] { serve(worker); });
    } catch (const std::exception& refusal) {
      const std::size_t started = members.size() + 1;
      stop();
      throw IoError(
          message("threads is {}, but only {} could be started: {}", threads, started, refusal.what()));
    }
  }

  ~Team() { stop(); }

  void stop() {
    stopping = true;
    loop.fetch_add(1, std::memory_order_release);
    loop.notify_all();
    for (std::thread& member : members) member.join();
  }

  void serve(int worker) {
    for (unsigned seen = 0;;) {
      wait_while(loop, seen);
      seen = loop.load(std::memory_order_acquire);
      if (stopping) return;
      work(worker);
      if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) {
        done.fetch_add(1, std::memory_order_release);
        done.notify_one();
      }
    }
  }

  void work(int worker) {
    inside_task = true;
    for (int task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
      try {
        (*body)(task, worker);
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        next.store(tasks, std::memory_order_relaxed);
      }
    }
    inside_task = false;
  }

  void run(int n, const std::function<void(int, int)>& f) {
    tasks = n;
    body = &f;
    next.store(0, std::memory_order_relaxed);
    busy.store(static_cast<int>(members.size()), std::memory_order_relaxed);
    const unsigned before = done.load(std::memory_order_relaxed);
    loop.fetch_add(1, std::memory_order_release);
    loop.notify_all();
    work(0);
    if (!members.empty()) wait_while(done, before);
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  const pid_t process;
  std::mutex claimed;
  std::atomic<unsigned> loop{0}, done{0};
  std::atomic<bool> stopping{false};
  std::atomic<int> next{0}, busy{0};
  int tasks = 0;
  const std::function<void(int, int)>* body = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;
  std::vector<std::thread> members;
};

WorkerPool::WorkerPool(int threads) : threads_(threads), team_(new Team(threads)) {}

WorkerPool::~WorkerPool() {
  // After a fork the members' threads do not exist; joining them would wait for ever.
  if (Team* team = team_.load(); team->process == getpid()) delete team;
}

// After a fork the parent's team is left where it is and a new one takes its place; of several threads of the
// child that come at once, one replaces it.
WorkerPool::Team& WorkerPool::team() {
  Team* team = team_.load();
  if (team->process == getpid()) return *team;
  auto fresh = std::make_unique<Team>(threads_);
  return team_.compare_exchange_strong(team, fresh.get()) ? *fresh.release() : *team;
}

WorkerPool::Claim::Claim(std::mutex& claimed) : outer_(mine) {
  if (mine == &claimed)
    throw std::runtime_error(
        "the runtime is busy with this thread's own call, as in a progress callback or a signal handler");
  lock_ = std::unique_lock(claimed);
  mine = &claimed;
}

WorkerPool::Claim::~Claim() { mine = outer_; }

WorkerPool::Claim WorkerPool::claim() { return Claim(team().claimed); }

void WorkerPool::parallel_for(int tasks, const std::function<void(int, int)>& body) {
  assert(!inside_task);
  if (tasks <= 1) {
    for (int task = 0; task < tasks; ++task) body(task, 0);
  } else {
    team_.load()->run(tasks, body);
  }
}

}  // namespace kt
