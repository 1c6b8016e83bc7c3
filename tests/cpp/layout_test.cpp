#include "cpu/layout.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <string>
#include <vector>

#include "base/error.h"

using namespace kt;

namespace {

// Nodes with so many cores each, of `smt` CPUs, and memory but where it is 0; all equally far.
Topology machine(const std::vector<int>& cores, int smt = 1, const std::vector<std::size_t>& gib = {}) {
  Topology topology;
  topology.nodes.clear();
  int cpu = 0;
  for (std::size_t n = 0; n < cores.size(); ++n) {
    NumaNode node{static_cast<int>(3 * n)};  // with gaps
    for (int core = 0; core < cores[n]; ++core) {
      node.cores.push_back(cpu);
      for (int thread = 0; thread < smt; ++thread) node.cpus.push_back(cpu++);
    }
    node.distances.assign(cores.size(), 20);
    node.distances[n] = 10;
    node.memory_bytes = (n < gib.size() ? gib[n] : 64) << 30;
    topology.nodes.push_back(node);
  }
  topology.cpus = std::max(1, cpu);
  topology.cores = std::max(1, cpu / smt);
  return topology;
}

std::vector<std::pair<std::string, Topology>> machines() {
  std::vector<std::pair<std::string, Topology>> all{
      {"one node", machine({8})},
      {"two sockets with SMT", machine({56, 56}, 2)},
      {"sub-NUMA clusters", machine({28, 28, 28, 28}, 2)},
      {"eight nodes", machine(std::vector<int>(8, 16))},
      {"sixteen nodes", machine(std::vector<int>(16, 64), 2)},
      {"asymmetric", machine({24, 8})},
      {"a restricted mask", machine({1, 13, 0, 5})},
      {"memory alone", machine({16, 0}, 2, {64, 256})},
      {"CPUs alone", machine({8, 8, 8}, 1, {64, 0, 64})},
      {"no memory known", machine({8, 8}, 1, {0, 0})},
      {"no CPUs known", machine({0, 0})},
      {"nothing known", Topology{}},
  };
  all.push_back({"memory of one node", machine({8, 8, 8, 8})});
  for (std::size_t n = 1; n < 4; ++n) all.back().second.nodes[n].memory_allowed = false;
  return all;
}

int total_threads(const ShardLayout& layout) {
  return std::accumulate(layout.nodes.begin(), layout.nodes.end(), 0,
                         [](int sum, const Node& node) { return sum + node.threads; });
}

}  // namespace

TEST_CASE("layout: each shard has one node, each thread and CPU counts once, memory is where there is some") {
  for (const auto& [name, topology] : machines())
    for (int threads = 1; threads <= 64; ++threads)
      for (int shards = 1; shards <= 16; ++shards) {
        CAPTURE(name);
        CAPTURE(threads);
        CAPTURE(shards);
        const ShardLayout layout = plan_layout(topology, threads, shards);
        REQUIRE(std::ssize(layout.shards) == shards);
        REQUIRE(!layout.nodes.empty());
        REQUIRE(total_threads(layout) == threads);
        REQUIRE(layout.nodes.front().threads >= 1);
        index_t next = 0;
        std::vector<int> cpus;
        for (const Node& node : layout.nodes) {
          REQUIRE(node.shards.begin == next);
          REQUIRE(node.shards.size() >= 1);
          REQUIRE(node.threads >= (threads < std::ssize(layout.nodes) ? 0 : 1));
          REQUIRE((node.threads > 0 || node.cpus.empty()));
          next = node.shards.end;
          cpus.insert(cpus.end(), node.cpus.begin(), node.cpus.end());
        }
        REQUIRE(next == shards);
        std::ranges::sort(cpus);
        std::vector<int> mask;
        for (const NumaNode& node : topology.nodes)
          mask.insert(mask.end(), node.cpus.begin(), node.cpus.end());
        std::ranges::sort(mask);
        // All threads of one node may run anywhere.
        REQUIRE(cpus == (layout.nodes.size() > 1 && threads > 1 ? mask : std::vector<int>{}));

        const bool some = std::ranges::any_of(topology.nodes, &NumaNode::has_memory);
        for (const Shard& shard : layout.shards) {
          REQUIRE(shard.weight >= 1);
          const std::vector<int>& memory = layout.nodes[shard.node].memory_nodes;
          REQUIRE(memory.empty() == (topology.nodes.size() == 1));
          std::vector<int> ids = memory;
          std::ranges::sort(ids);
          REQUIRE(std::ranges::adjacent_find(ids) == ids.end());
          for (const int id : ids) {
            const auto node = std::ranges::find(topology.nodes, id, &NumaNode::id);
            REQUIRE(node != topology.nodes.end());
            REQUIRE((node->has_memory() || !some));
          }
        }
      }
}

TEST_CASE("layout: chosen nodes, each as often as it is named") {
  const Topology topology = machines().front().second;
  const int id = topology.nodes.front().id;
  const Topology twice = choose_nodes(topology, std::array{id, id});
  CHECK(twice.cores == std::ssize(topology.nodes.front().cores));
  const ShardLayout layout = plan_layout(twice, 4, 3);
  REQUIRE(layout.nodes.size() == 2);
  for (const Node& node : layout.nodes) {
    CHECK(node.threads == 2);
    CHECK(node.cpus == topology.nodes.front().cpus);
  }
  for (const Node& node : layout.nodes) CHECK(node.memory_nodes == std::vector{id});
  const ShardLayout one = plan_layout(choose_nodes(topology, std::array{id}), 2, 1);
  CHECK(one.nodes.front().cpus == topology.nodes.front().cpus);
  CHECK_THROWS_WITH_AS(choose_nodes(topology, std::array{id, 99}), doctest::Contains("nodes names node 99"),
                       ValueError);
  CHECK_THROWS_WITH_AS(choose_nodes(topology, {}), doctest::Contains("nodes is empty"), ValueError);
}

TEST_CASE("layout: the shards' parts of a dimension cover it, as large as the cores behind them") {
  for (const auto& [name, topology] : machines())
    for (const int shards : {1, 2, 3, 4, 7, 8, 16})
      for (const index_t n : {0, 32, 96, 768, 1536, 11008}) {
        CAPTURE(name);
        CAPTURE(shards);
        CAPTURE(n);
        const ShardLayout layout = plan_layout(topology, topology.cpus, shards);
        std::vector<index_t> weights;
        for (const Shard& shard : layout.shards) weights.push_back(shard.weight);
        const double all = static_cast<double>(std::accumulate(weights.begin(), weights.end(), index_t{0}));
        index_t next = 0;
        const std::vector<Range> parts = split_by(n, weights, 32);
        for (std::size_t s = 0; s < parts.size(); ++s) {
          REQUIRE(parts[s].begin == next);
          next = parts[s].end;
          const double wanted = static_cast<double>(n) * static_cast<double>(weights[s]) / all;
          REQUIRE(std::abs(static_cast<double>(parts[s].size()) - wanted) <= 32);
        }
        REQUIRE(next == n);
      }
}

TEST_CASE("layout: a shard's weight is its share of its nodes' cores") {
  const ShardLayout one_each = plan_layout(machine({24, 8}), 32, 2);
  CHECK(one_each.shards[0].weight == 3 * one_each.shards[1].weight);
  CHECK(one_each.nodes[0].threads == 24);
  CHECK(one_each.nodes[1].threads == 8);

  const ShardLayout four = plan_layout(machine({24, 8}), 32, 4);  // three for node 0, one for node 1
  REQUIRE(four.nodes.size() == 2);
  index_t sum = 0;
  for (index_t s = four.nodes[0].shards.begin; s < four.nodes[0].shards.end; ++s)
    sum += four.shards[static_cast<std::size_t>(s)].weight;
  CHECK(sum == 3 * four.shards[3].weight);

  for (const Shard& shard : plan_layout(machine({28, 28, 28, 28}, 2), 224, 8).shards)
    CHECK(shard.weight == plan_layout(machine({28, 28, 28, 28}, 2), 224, 8).shards[0].weight);
}

TEST_CASE(
    "layout: fewer shards than NUMA nodes: several are one; fewer threads than nodes: one serves some") {
  const Topology eight = machine(std::vector<int>(8, 16));
  const ShardLayout two = plan_layout(eight, 128, 2);
  CHECK(two.nodes[0].memory_nodes == std::vector{0, 3, 6, 9});
  CHECK(two.nodes[1].memory_nodes == std::vector{12, 15, 18, 21});
  REQUIRE(two.nodes.size() == 2);
  CHECK(two.nodes[0].cpus.size() == 64);
  CHECK(two.nodes[1].threads == 64);

  const ShardLayout few = plan_layout(eight, 3, 8);
  REQUIRE(few.nodes.size() == 8);
  for (const std::size_t node : {0, 3, 6}) CHECK(few.nodes[node].threads == 1);
  CHECK(few.nodes[0].cpus.size() == 48);
  CHECK(few.nodes[6].cpus.size() == 32);
}

TEST_CASE("layout: a node without memory takes it from the nearest one that has some for this process") {
  Topology topology = machine({8, 8, 8}, 1, {64, 0, 64});
  topology.nodes[1].distances = {32, 10, 12};
  CHECK(plan_layout(topology, 24, 3).nodes[1].memory_nodes == std::vector{6});
  topology.nodes[2].memory_allowed = false;
  CHECK(plan_layout(topology, 24, 3).nodes[1].memory_nodes == std::vector{0});
  CHECK(plan_layout(topology, 24, 3).nodes[2].memory_nodes == std::vector{0});
  CHECK(plan_layout(topology, 24, 1).nodes[0].memory_nodes == std::vector{0});
}

TEST_CASE("layout: a node of memory alone serves no shard while another has some") {
  const ShardLayout layout = plan_layout(machine({16, 0}, 2, {64, 256}), 32, 4);
  CHECK(layout.nodes.size() == 1);
  for (const Node& node : layout.nodes) CHECK(node.memory_nodes == std::vector{0});
}
