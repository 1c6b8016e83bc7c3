#include "cpu/worker_pool.h"

#include <atomic>
#include <cassert>
#include <exception>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <thread>
#include <utility>
#include <vector>

#include "base/error.h"
#include "cpu/processor.h"
#include "cpu/sysfs.h"

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
    spin();
  }
  while (word.load(std::memory_order_acquire) == old) word.wait(old, std::memory_order_acquire);
}

// The calling thread on some CPUs during its life, where the operating system allows it, also to go back.
class OnCpus {
 public:
  explicit OnCpus(std::span<const int> cpus) : cpus_(cpus) {
    if (cpus.empty()) return;
    before_ = affinity();
    moved_ = !before_.empty() && set_affinity(cpus);
  }
  ~OnCpus() {
    if (moved_) set_affinity(before_);
  }
  OnCpus(const OnCpus&) = delete;
  OnCpus& operator=(const OnCpus&) = delete;

  // Calls f where the thread was before.
  void leave_for(const std::function<void()>& f) const {
    if (moved_) set_affinity(before_);
    f();
    if (moved_) set_affinity(cpus_);
  }

 private:
  std::span<const int> cpus_;
  std::vector<int> before_;
  bool moved_ = false;
};

int sum_of_threads(std::span<const Node> nodes) {
  int threads = 0;
  for (const Node& node : nodes) threads += node.threads;
  return threads;
}

}  // namespace

// The threads of one process.
struct WorkerPool::Crew {
  explicit Crew(std::span<const Node> nodes) : queues(nodes.size()) {
    for (std::size_t t = 0; t < nodes.size(); ++t) {
      queues[t].cpus = nodes[t].cpus;
      node_of.insert(node_of.end(), to_size(nodes[t].threads), to_int(t));
    }
    try {
      for (int worker = 1; worker < std::ssize(node_of); ++worker)
        members.emplace_back([this, worker] { serve(worker); });
    } catch (const std::exception& refusal) {
      const std::size_t started = members.size() + 1;
      stop();
      throw IoError(message("threads is {}, but only {} could be started: {}", node_of.size(), started,
                            refusal.what()));
    }
  }

  ~Crew() { stop(); }

  void stop() {
    stopping = true;
    loop.fetch_add(1, std::memory_order_release);
    loop.notify_all();
    for (std::thread& member : members) member.join();
  }

  void serve(int worker) {
    set_affinity(queues[to_size(node_of[to_size(worker)])].cpus);
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

  // `between` is called after each task.
  void work(int worker, const std::function<void()>& between = {}) {
    inside_task = true;
    const int node = shared ? 0 : node_of[to_size(worker)];
    Queue& queue = queues[to_size(node)];
    for (int task; (task = queue.next.fetch_add(1, std::memory_order_relaxed)) < queue.tasks;) {
      try {
        (*body)(node, task, worker);
        if (between) between();
      } catch (...) {
        const std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
        for (Queue& other : queues) other.next.store(other.tasks, std::memory_order_relaxed);
      }
    }
    inside_task = false;
  }

  // `share`: all threads take tasks from the first queue.
  void run(std::span<const int> tasks, bool share, const NodeBody& f, const std::function<void()>& between) {
    // What can throw comes first: from the moment when the members see the loop until they are done with it,
    // this frame has to stay.
    const OnCpus here(queues.front().cpus);
    std::function<void()> after;
    if (between) after = [&] { here.leave_for(between); };
    shared = share;
    body = &f;
    for (std::size_t t = 0; t < tasks.size(); ++t) {
      queues[t].tasks = tasks[t];
      queues[t].next.store(0, std::memory_order_relaxed);
    }
    busy.store(to_int(members.size()), std::memory_order_relaxed);
    const unsigned before = done.load(std::memory_order_relaxed);
    loop.fetch_add(1, std::memory_order_release);
    loop.notify_all();
    work(0, after);
    if (!members.empty()) wait_while(done, before);
    if (error) std::rethrow_exception(std::exchange(error, nullptr));
  }

  struct alignas(64) Queue {  // on a line of its own
    std::atomic<int> next{0};
    int tasks = 0;
    std::vector<int> cpus;
  };
  std::vector<Queue> queues;  // one a node
  std::vector<int> node_of;   // of every worker

  std::mutex claimed;
  std::atomic<unsigned> loop{0}, done{0};
  std::atomic<bool> stopping{false};
  std::atomic<int> busy{0};
  bool shared = true;
  const NodeBody* body = nullptr;
  std::mutex error_mutex;
  std::exception_ptr error;
  std::vector<std::thread> members;
};

WorkerPool::WorkerPool(std::vector<Node> nodes)
    : nodes_(std::move(nodes)),
      threads_(sum_of_threads(nodes_)),
      crew_([this] { return std::make_unique<Crew>(nodes_); }) {}

WorkerPool::~WorkerPool() = default;

WorkerPool::Claim::Claim(std::mutex& claimed) : outer_(mine) {
  if (mine == &claimed)
    throw std::runtime_error(
        "the runtime is busy with this thread's own call, as in a progress callback or a signal handler");
  lock_ = std::unique_lock(claimed);
  mine = &claimed;
}

WorkerPool::Claim::~Claim() { mine = outer_; }

WorkerPool::Claim WorkerPool::claim() { return Claim(crew_.get().claimed); }

void WorkerPool::parallel_for(int tasks, const std::function<void(int, int)>& body,
                              const std::function<void()>& between) {
  run({&tasks, 1}, /*share=*/true, [&](int, int task, int worker) { body(task, worker); }, between);
}

void WorkerPool::parallel_for_nodes(std::span<const int> tasks, const NodeBody& body) {
  assert(tasks.size() == nodes_.size());
  run(tasks, /*share=*/false, body, {});
}

void WorkerPool::run(std::span<const int> tasks, bool share, const NodeBody& body,
                     const std::function<void()>& between) {
  assert(!inside_task);
  if (std::accumulate(tasks.begin(), tasks.end(), index_t{0}) > 1)
    return crew_.get().run(tasks, share, body, between);
  for (std::size_t node = 0; node < tasks.size(); ++node)  // not worth waking anyone
    if (tasks[node] > 0) {
      body(to_int(node), 0, 0);
      if (between) between();
    }
}

}  // namespace kt
