// Where layers run: the kernel set, the worker pool and the scratch memory that calls reuse.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/memory.h"
#include "cpu/layout.h"
#include "cpu/topology.h"
#include "cpu/worker_pool.h"
#include "kernels/kernel_set.h"
#include "moe/profile.h"

namespace kt {

inline constexpr int kMostShards = 64;

// The threads of a runtime and the shards they serve, as plain data.
struct Workers {
  std::vector<int> threads;          // of each node
  std::vector<std::size_t> node_of;  // of each shard
  std::size_t l2_bytes;
};

// The machine's topology without the nodes that are not given, nor named by KT_MOE_NODES ("0,2-3").
Topology usable_topology(const std::optional<std::vector<int>>& nodes);

class Runtime {
 public:
  // What is not given comes from KT_MOE_THREADS, KT_MOE_SHARDS and KT_MOE_ISA, or else is what the machine
  // has.
  Runtime(std::optional<int> threads, std::optional<int> shards, std::optional<std::string> isa,
          Topology topology = usable_topology({}));

  int threads() const { return pool_.threads(); }
  int shards() const { return to_int(layout_.shards.size()); }
  // Cuts [0, n) among the shards, in proportion to their cores, on multiples of `align`. The layer and what
  // brings its weights to the shards' memory use the same cut.
  std::vector<Range> split(index_t n, index_t align) const;
  // The NUMA nodes of a shard's memory; none where the machine has but one.
  const std::vector<int>& memory_nodes_of(std::size_t shard) const {
    return layout_.nodes[layout_.shards[shard].node].memory_nodes;
  }
  // A shard's share of all work, in the same unit for all shards.
  index_t weight_of(std::size_t shard) const { return layout_.shards[shard].weight; }
  const std::string& isa() const { return isa_; }
  // The NUMA nodes whose CPUs compute, as often as they were chosen.
  std::vector<int> nodes() const;
  // The most scratch memory that the last lease held at once, in all arenas. Waits while there is a lease.
  std::size_t scratch_bytes();
  // The memory that results are written to; it outlives the runtime while there are some.
  const std::shared_ptr<BufferPool>& results() const { return results_; }

  // Every call from here on is recorded by this profile, or with null by none. Waits while a call runs.
  void set_profile(std::shared_ptr<Profile> profile);
  // The first shard that each thread serves.
  std::vector<int> first_shards() const;

  // The runtime for one caller at a time. The next lease overwrites what this one took from an `arena`.
  class Lease {
   public:
    explicit Lease(Runtime& runtime);

    const KernelSet& kernels() const { return runtime_.kernels_; }
    Workers workers() const;
    // Scratch of a node's own, for all of a call.
    Arena& arena(std::size_t node) { return runtime_.arenas_[node]; }
    // The profile that records this call, or null.
    Profile* profile() const { return runtime_.profile_.get(); }
    // The recorder of the thread whose scratch this is, or null.
    Recorder* recorder(const Arena& scratch) const {
      if (profile() == nullptr) return nullptr;
      return &profile()->recorder(to_size(&scratch - runtime_.scratch_.data()));
    }

    // Runs body(task, scratch) for every task in [0, tasks); scratch is the task's alone until it returns.
    // `between` is that of WorkerPool::parallel_for.
    void parallel_for(index_t tasks, const std::function<void(index_t task, Arena& scratch)>& body,
                      const std::function<void()>& between = {});
    // The same for every node, with tasks[node] tasks of its own.
    using NodeBody = std::function<void(std::size_t node, index_t task, Arena& scratch)>;
    void parallel_for_nodes(std::span<const index_t> tasks, const NodeBody& body);

   private:
    Runtime& runtime_;
    WorkerPool::Claim claim_;
  };

 private:
  std::string isa_;
  KernelSet kernels_;
  Topology topology_;
  ShardLayout layout_;
  std::size_t l2_bytes_;
  WorkerPool pool_;
  std::vector<Arena> arenas_;   // one a node
  std::vector<Arena> scratch_;  // one a worker
  std::shared_ptr<Profile> profile_;
  std::shared_ptr<BufferPool> results_ = std::make_shared<BufferPool>();
};

}  // namespace kt
