#include "cpu/topology.h"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <map>
#include <set>
#include <tuple>

#include "base/view.h"
#include "cpu/sysfs.h"

namespace kt {

namespace {

constexpr int kMostNodes = 1024;                       // that a kernel can have
constexpr int kOwnDistance = 10, kOtherDistance = 20;  // the kernel's, where firmware has no table

std::string cpu_folder(int cpu) { return "sys/devices/system/cpu/cpu" + std::to_string(cpu) + "/"; }

std::string node_folder(int node) { return "sys/devices/system/node/node" + std::to_string(node) + "/"; }

bool contains(const std::vector<int>& ascending, int id) { return std::ranges::binary_search(ascending, id); }

// Both ascending.
std::vector<int> common(const std::vector<int>& a, const std::vector<int>& b) {
  std::vector<int> both;
  std::ranges::set_intersection(a, b, std::back_inserter(both));
  return both;
}

std::vector<int> usable_cpus(const SystemFiles& files, std::vector<int> mask,
                             const std::vector<int>& online) {
  std::ranges::sort(mask);
  mask.erase(std::unique(mask.begin(), mask.end()), mask.end());
  std::erase_if(mask, [](int cpu) { return cpu < 0 || cpu >= kMostIds; });
  if (mask.empty()) mask = parse_list(files.field("proc/self/status", "Cpus_allowed_list"));
  if (std::vector<int> both = common(mask, online); !both.empty()) return both;
  if (mask.empty()) mask = online;
  return mask.empty() ? std::vector<int>{0} : mask;
}

// For every CPU the first of its core.
std::map<int, int> first_of_core(const SystemFiles& files, const std::vector<int>& cpus) {
  std::map<int, int> first;
  std::map<std::tuple<std::int64_t, std::int64_t, std::int64_t>, int> by_ids;
  for (const int cpu : cpus) {
    if (first.contains(cpu)) continue;
    const std::string folder = cpu_folder(cpu) + "topology/";
    std::vector<int> siblings = files.list(folder + "core_cpus_list");
    if (siblings.empty()) siblings = files.list(folder + "thread_siblings_list");  // before Linux 5.2
    if (contains(siblings, cpu)) {
      for (const int sibling : common(siblings, cpus)) first.emplace(sibling, cpu);
      continue;
    }
    const auto core = files.number(folder + "core_id");
    const auto package = files.number(folder + "physical_package_id");
    const auto ids =
        std::tuple(package.value_or(0), files.number(folder + "die_id").value_or(0), core.value_or(0));
    first[cpu] = core ? by_ids.emplace(ids, cpu).first->second : cpu;
  }
  return first;
}

// The number of a cache's folder below a CPU's, by level; -1: there is none.
int cache_index(const SystemFiles& files, int cpu, int level) {
  for (int index = 0; index < 16; ++index) {
    const std::string folder = cpu_folder(cpu) + "cache/index" + std::to_string(index) + "/";
    const auto there = files.number(folder + "level");
    if (!there) break;
    if (*there == level && files.line(folder + "type") != "Instruction") return index;
  }
  return -1;
}

std::vector<std::vector<int>> cache_domains(const SystemFiles& files, const std::vector<int>& cpus,
                                            int index) {
  std::vector<std::vector<int>> domains;
  std::set<int> seen;
  for (const int cpu : cpus) {
    if (seen.contains(cpu)) continue;
    const std::vector<int> shared =
        files.list(cpu_folder(cpu) + "cache/index" + std::to_string(index) + "/shared_cpu_list");
    if (!contains(shared, cpu)) continue;
    std::vector<int> domain = common(shared, cpus);
    std::erase_if(domain, [&](int other) { return seen.contains(other); });
    seen.insert(domain.begin(), domain.end());
    domains.push_back(std::move(domain));
  }
  return domains;
}

// Every core of a machine has caches alike: those of the first CPU here that tells of them.
void read_caches(const SystemFiles& files, const std::vector<int>& cpus, Topology& t) {
  const auto tells = [&](int cpu) {
    return files.number(cpu_folder(cpu) + "cache/index0/level").has_value();
  };
  const auto cpu = std::ranges::find_if(cpus, tells);
  if (cpu == cpus.end()) return;
  const auto read = [&](int level, std::size_t& bytes, std::vector<std::vector<int>>* domains) {
    const int index = cache_index(files, *cpu, level);
    if (index < 0) return;
    bytes = parse_size(files.line(cpu_folder(*cpu) + "cache/index" + std::to_string(index) + "/size"));
    if (domains != nullptr) *domains = cache_domains(files, cpus, index);
  };
  read(1, t.l1d, nullptr);
  read(2, t.l2, &t.l2_domains);
  read(3, t.l3, &t.l3_domains);
}

// Of a line "MemTotal:  16384 kB", which in a node's file begins with "Node 0 ".
std::size_t memory_field(const SystemFiles& files, const std::string& path, const std::string& name) {
  const std::vector<std::int64_t> kib = parse_numbers(files.field(path, name));
  constexpr std::int64_t kMost = std::int64_t{1} << 50;
  return kib.empty() || kib[0] < 0 || kib[0] > kMost ? 0 : to_size(kib[0]) * 1024;
}

void read_memory(const SystemFiles& files, const std::string& path, const std::string& prefix,
                 NumaNode& node) {
  node.memory_bytes = memory_field(files, path, prefix + "MemTotal");
  node.free_bytes = std::min(node.memory_bytes, memory_field(files, path, prefix + "MemFree"));
  node.cache_bytes = memory_field(files, path, prefix + "Active(file)") +
                     memory_field(files, path, prefix + "Inactive(file)");
}

std::vector<int> distances(const SystemFiles& files, int id, std::size_t own, std::size_t nodes) {
  std::vector<int> all(nodes, kOtherDistance);
  all[own] = kOwnDistance;
  const std::vector<std::int64_t> told = parse_numbers(files.line(node_folder(id) + "distance"));
  for (std::size_t i = 0; told.size() == nodes && i < nodes; ++i)
    if (i != own && told[i] > 0 && told[i] < 256) all[i] = to_int(told[i]);
  return all;
}

std::vector<NumaNode> read_nodes(const SystemFiles& files, const std::vector<int>& cpus) {
  std::vector<int> ids = files.numbered("sys/devices/system/node", "node");
  std::erase_if(ids, [](int id) { return id >= kMostNodes; });
  std::vector<NumaNode> nodes;
  std::set<int> left(cpus.begin(), cpus.end());
  for (std::size_t i = 0; i < ids.size(); ++i) {
    NumaNode node{ids[i]};
    for (const int cpu : common(files.list(node_folder(node.id) + "cpulist"), cpus))
      if (left.erase(cpu) == 1) node.cpus.push_back(cpu);
    node.distances = distances(files, node.id, i, ids.size());
    read_memory(files, node_folder(node.id) + "meminfo", "Node " + std::to_string(node.id) + " ", node);
    nodes.push_back(std::move(node));
  }
  if (nodes.empty()) nodes.push_back({0, {}, {}, {kOwnDistance}});
  if (nodes.size() == 1 && nodes[0].memory_bytes == 0) read_memory(files, "proc/meminfo", "", nodes[0]);
  if (!left.empty()) {  // the tree is incomplete
    const auto with_cpus = std::ranges::find_if(nodes, [](const NumaNode& n) { return !n.cpus.empty(); });
    std::vector<int>& home = (with_cpus == nodes.end() ? nodes.front() : *with_cpus).cpus;
    home.insert(home.end(), left.begin(), left.end());
    std::ranges::sort(home);
  }
  return nodes;
}

void allow_memory(const SystemFiles& files, std::vector<NumaNode>& nodes) {
  const std::vector<int> allowed = parse_list(files.field("proc/self/status", "Mems_allowed_list"));
  const auto is_allowed = [&](const NumaNode& node) { return contains(allowed, node.id); };
  if (std::ranges::none_of(nodes, is_allowed)) return;  // it tells nothing of these nodes
  for (NumaNode& node : nodes) node.memory_allowed = is_allowed(node);
}

}  // namespace

Topology read_topology(const std::string& root, const std::optional<std::vector<int>>& cpus) {
  const SystemFiles files(root);
  Topology t;
  t.model = files.field("proc/cpuinfo", "model name");
  if (t.model.empty()) t.model = "unknown";
  std::ranges::replace_if(t.model, [](char c) { return c < ' ' || c > '~'; }, '?');
  t.online = files.list("sys/devices/system/cpu/online");
  const std::vector<int> usable = usable_cpus(files,
                                              cpus          ? *cpus
                                              : root == "/" ? affinity()
                                                            : std::vector<int>{},
                                              t.online);
  t.nodes = read_nodes(files, usable);
  allow_memory(files, t.nodes);

  const std::map<int, int> first = first_of_core(files, usable);
  std::map<int, int> cores;  // by its first CPU, the number of its CPUs
  for (const auto& [cpu, core] : first) t.threads_per_core = std::max(t.threads_per_core, ++cores[core]);
  for (NumaNode& node : t.nodes) {
    std::set<int> seen;
    for (const int cpu : node.cpus)
      if (seen.insert(first.at(cpu)).second) node.cores.push_back(cpu);
  }
  std::set<std::int64_t> packages;
  for (const auto& [core, count] : cores)
    if (const auto package = files.number(cpu_folder(core) + "topology/physical_package_id"))
      packages.insert(*package);
  t.packages = std::max(1, to_int(packages.size()));
  read_caches(files, usable, t);

  const CgroupLimits limits = cgroup_limits(files);
  t.cgroup_cpus = limits.cpus;
  t.cgroup_memory = limits.memory;
  t.cpus = to_int(usable.size());
  if (limits.cpus > 0) t.cpus = to_int(std::clamp<double>(std::ceil(limits.cpus), 1, t.cpus));
  t.cores = std::min(t.cpus, to_int(cores.size()));
  return t;
}

}  // namespace kt
