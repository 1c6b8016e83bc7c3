#include "cpu/cgroup.h"

#include <algorithm>

namespace kt {

namespace {

// Version 1 writes "no limit" as the most that pages can number.
constexpr std::int64_t kNoMemoryLimit = std::int64_t{1} << 60;

class Limits {
 public:
  explicit Limits(const SystemFiles& files) : files_(files) {}

  void read(const std::string& folder) {
    cpus(parse_numbers(files_.line(folder + "cpu.max")));  // "max 100000" has no number in front
    if (const auto quota = files_.number(folder + "cpu.cfs_quota_us"))
      cpus({*quota, files_.number(folder + "cpu.cfs_period_us").value_or(0)});
    for (const char* name : {"memory.max", "memory.high", "memory.limit_in_bytes"})
      memory(files_.number(folder + name).value_or(0));
  }

  const CgroupLimits& found() const { return found_; }

 private:
  void cpus(const std::vector<std::int64_t>& quota_and_period) {
    if (quota_and_period.size() != 2 || std::ranges::min(quota_and_period) <= 0) return;
    const double limit = static_cast<double>(quota_and_period[0]) / static_cast<double>(quota_and_period[1]);
    if (found_.cpus == 0 || limit < found_.cpus) found_.cpus = limit;
  }

  void memory(std::int64_t bytes) {
    if (bytes <= 0 || bytes >= kNoMemoryLimit) return;
    const auto limit = static_cast<std::size_t>(bytes);
    if (found_.memory == 0 || limit < found_.memory) found_.memory = limit;
  }

  const SystemFiles& files_;
  CgroupLimits found_;
};

// Where a hierarchy with these controllers may be mounted; empty: version 2, also beside version 1.
std::vector<std::string> mounts(const std::string& controllers) {
  const std::string all = "sys/fs/cgroup/";
  if (controllers.empty()) return {all, all + "unified/"};
  std::vector<std::string> found;
  for (const std::string name : {"cpu", "memory"})
    if (("," + controllers + ",").find("," + name + ",") != std::string::npos) {
      found.push_back(all + name + "/");
      if (controllers != name) found.push_back(all + controllers + "/");
    }
  return found;
}

}  // namespace

CgroupLimits cgroup_limits(const SystemFiles& files) {
  Limits limits(files);
  // Lines of number:controllers:path. Sound ones are far shorter.
  const std::string groups = files.text("proc/self/cgroup").substr(0, 16384);
  for (std::size_t begin = 0; begin < groups.size();) {
    const std::size_t end = std::min(groups.find('\n', begin), groups.size());
    const std::string line = groups.substr(begin, end - begin);
    begin = end + 1;
    const std::size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    for (const std::string& mount : mounts(line.substr(first + 1, second - first - 1))) {
      // In a container the path may be the host's: then only the mount is there, and is the container's own.
      // One that is none of ours may even lead upwards.
      std::string path = line.substr(second + 1);
      if (!path.starts_with('/') || path.find("/..") != std::string::npos) path.clear();
      for (; path.size() > 1; path.resize(path.rfind('/'))) limits.read(mount + path.substr(1) + "/");
      limits.read(mount);
    }
  }
  if (groups.empty())
    for (const char* controllers : {"", "cpu", "memory"})
      for (const std::string& mount : mounts(controllers)) limits.read(mount);
  return limits.found();
}

}  // namespace kt
