#include "cpu/topology.h"

#include "cpu/affinity.h"

#include <algorithm>
#include <cmath>
#include <fstream>

namespace kt {

namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

std::string cpu_model() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(std::min(line.size(), line.find(':') + 2));
  return "unknown";
}

// CPU time a cgroup may use, in CPUs; 0 when unlimited.
double cgroup_cpu_limit() {
  double quota = 0, period = 0;
  if (std::ifstream v2("/sys/fs/cgroup/cpu.max"); v2 >> quota >> period && period > 0) return quota / period;
  std::ifstream quota_v1("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"),
      period_v1("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  if (quota_v1 >> quota && period_v1 >> period && quota > 0 && period > 0) return quota / period;
  return 0;
}

std::size_t parse_size(const std::string& text) {  // "1024K"
  std::size_t digits = 0;
  while (digits < text.size() && text[digits] >= '0' && text[digits] <= '9') ++digits;
  if (digits == 0 || digits > 12) return 0;
  const std::size_t unit = digits == text.size() ? 1
                           : text[digits] == 'K' ? 1 << 10
                           : text[digits] == 'M' ? 1 << 20
                                                 : 1;
  return std::stoull(text.substr(0, digits)) * unit;
}

void read_caches(Topology& t) {
  for (int index = 0; index < 8; ++index) {
    const std::string dir = "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    const std::string level = first_line(dir + "level"), type = first_line(dir + "type");
    if (level.empty() || type == "Instruction") continue;
    const std::size_t size = parse_size(first_line(dir + "size"));
    if (level == "1") t.l1d = size;
    if (level == "2") t.l2 = size;
    if (level == "3") t.l3 = size;
  }
}

}  // namespace

Topology read_topology() {
  Topology t;
  t.model = cpu_model();
  t.cpus = std::max(1, static_cast<int>(cpus_of(current_mask()).size()));
  if (const double limit = cgroup_cpu_limit(); limit > 0)
    t.cpus = std::clamp(static_cast<int>(std::ceil(limit)), 1, t.cpus);
  t.cores = t.cpus;
  read_caches(t);
  return t;
}

}  // namespace kt
