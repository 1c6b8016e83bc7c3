#include "moe/runtime.h"

#include <algorithm>
#include <charconv>
#include <cstdlib>
#include <utility>

#include "base/error.h"
#include "cpu/processor.h"
#include "cpu/sysfs.h"
#include "kernels/registry.h"

namespace kt {

namespace {

constexpr std::size_t kUsualL2 = std::size_t{1} << 20;
constexpr int kMostThreads = 4096;

// What the environment says; this is the one place that reads it. An empty variable is as good as none.
std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
}

// The argument, else the environment variable, else the fallback.
int number(const char* what, std::optional<int> argument, const char* variable, int fallback, int most) {
  if (argument) {
    KT_CHECK(*argument >= 1 && *argument <= most, "{} is {}, wanted a number from 1 to {}", what, *argument,
             most);
    return *argument;
  }
  const std::optional<std::string> text = environment(variable);
  if (!text) return fallback;
  int value = 0;
  const auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), value);
  KT_CHECK(error == std::errc() && end == text->data() + text->size() && value >= 1 && value <= most,
           "{} is \"{}\", wanted a number from 1 to {}", variable, *text, most);
  return value;
}

// As many threads as cores, and as many shards as nodes with CPUs have a thread, unless told otherwise.
ShardLayout choose_layout(const Topology& topology, std::optional<int> threads, std::optional<int> shards) {
  const int count = number("threads", threads, "KT_MOE_THREADS", topology.cores, kMostThreads);
  const auto nodes = std::ranges::count_if(topology.nodes, [](const NumaNode& n) { return !n.cpus.empty(); });
  const int usual = std::clamp(to_int(nodes), 1, std::min(count, kMostShards));
  return plan_layout(topology, count, number("shards", shards, "KT_MOE_SHARDS", usual, kMostShards));
}

std::string choose_isa(const std::optional<std::string>& argument) {
  if (argument) return *argument;
  if (const auto chosen = environment("KT_MOE_ISA")) return *chosen;
  return std::string(best_permitted_isa(cpu_features()));
}

std::vector<int> node_list(const std::string& text) {
  std::vector<int> nodes;
  for (std::size_t begin = 0, end; begin <= text.size(); begin = end + 1) {
    end = std::min(text.find(',', begin), text.size());
    const std::vector<int> some = parse_list(text.substr(begin, end - begin));
    KT_CHECK(!some.empty(), "KT_MOE_NODES is \"{}\", wanted NUMA nodes such as \"0,2-3\"", text);
    nodes.insert(nodes.end(), some.begin(), some.end());
  }
  return nodes;
}

}  // namespace

Topology usable_topology(const std::optional<std::vector<int>>& nodes) {
  Topology topology = read_topology();
  if (nodes) return choose_nodes(std::move(topology), *nodes);
  const std::optional<std::string> text = environment("KT_MOE_NODES");
  return text ? choose_nodes(std::move(topology), node_list(*text)) : topology;
}

Runtime::Runtime(std::optional<int> threads, std::optional<int> shards, std::optional<std::string> isa,
                 Topology topology)
    : isa_(choose_isa(isa)),
      kernels_(kernel_set(isa_, cpu_features())),
      topology_(std::move(topology)),
      layout_(choose_layout(topology_, threads, shards)),
      pool_(layout_.nodes) {
  // The first cache level has a way for each 4 KiB of its size, and lines that lie a multiple of 4 KiB apart
  // share a set. With fewer ways than a tile has rows, these would drive each other out where they lie.
  constexpr std::size_t kWay = 4096;
  if (topology_.l1d < to_size(kernels_.gemm.mr) * kWay) kernels_.gemm.in_place = false;
  l2_bytes_ = topology_.l2 == 0 ? kUsualL2 : topology_.l2;
  for (const Node& node : layout_.nodes) {
    arenas_.emplace_back(node.memory_nodes);
    for (int thread = 0; thread < node.threads; ++thread) scratch_.emplace_back(node.memory_nodes);
  }
}

std::size_t Runtime::scratch_bytes() {
  const WorkerPool::Claim claim = pool_.claim();
  std::size_t total = 0;
  for (const auto* arenas : {&arenas_, &scratch_})
    for (const Arena& arena : *arenas) total += arena.peak();
  return total;
}

std::vector<Range> Runtime::split(index_t n, index_t align) const {
  std::vector<index_t> weights;
  for (const Shard& shard : layout_.shards) weights.push_back(shard.weight);
  return split_by(n, weights, align);
}

std::vector<int> Runtime::nodes() const {
  std::vector<int> ids;
  for (const NumaNode& node : topology_.nodes)
    if (!node.cpus.empty()) ids.push_back(node.id);
  return ids;
}

void Runtime::set_profile(std::shared_ptr<Profile> profile) {
  const WorkerPool::Claim claim = pool_.claim();
  profile_ = std::move(profile);
}

std::vector<int> Runtime::first_shards() const {
  std::vector<int> shards;
  for (const Node& node : layout_.nodes)
    shards.insert(shards.end(), to_size(node.threads), to_int(node.shards.begin));
  return shards;
}

Runtime::Lease::Lease(Runtime& runtime) : runtime_(runtime), claim_(runtime.pool_.claim()) {
  // In a forked child it is left where it is, as the parent's threads are.
  if (auto& profile = runtime_.profile_; profile != nullptr && !profile->is_own())
    new std::shared_ptr<Profile>(std::move(profile));
  for (Arena& arena : runtime_.arenas_) {
    arena.reset();
    arena.reset_peak();
  }
  for (Arena& arena : runtime_.scratch_) arena.reset_peak();
}

Workers Runtime::Lease::workers() const {
  Workers workers{{}, {}, runtime_.l2_bytes_};
  for (const Node& node : runtime_.layout_.nodes) workers.threads.push_back(node.threads);
  for (const Shard& shard : runtime_.layout_.shards) workers.node_of.push_back(shard.node);
  return workers;
}

void Runtime::Lease::parallel_for(index_t tasks, const std::function<void(index_t, Arena&)>& body,
                                  const std::function<void()>& between) {
  const auto with_scratch = [&](int task, int worker) {
    Arena& scratch = runtime_.scratch_[to_size(worker)];
    scratch.reset();
    const UsualFloats floats;
    body(task, scratch);
  };
  runtime_.pool_.parallel_for(to_int(tasks), with_scratch, between);
}

void Runtime::Lease::parallel_for_nodes(std::span<const index_t> tasks, const NodeBody& body) {
  const std::vector<int> counts(tasks.begin(), tasks.end());
  runtime_.pool_.parallel_for_nodes(counts, [&](int node, int task, int worker) {
    Arena& scratch = runtime_.scratch_[to_size(worker)];
    scratch.reset();
    const UsualFloats floats;
    body(to_size(node), task, scratch);
  });
}

}  // namespace kt
