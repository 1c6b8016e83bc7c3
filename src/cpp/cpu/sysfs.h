// What the operating system says: small files of /proc and /sys below a root and the numbers in them, the
// limits of control groups, and the CPUs that a thread may run on. What is missing or damaged is empty, in
// little time and memory: nothing here throws for it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace kt {

// Numbers of CPUs and nodes from here on are damage: kernels have at most 8192 CPUs.
constexpr int kMostIds = 1 << 16;

// "0-3,8" as ascending numbers, each once. Parts that are no number or range below kMostIds are left out.
std::vector<int> parse_list(std::string_view text);

// "10 21 -1" up to the first that is no integer.
std::vector<std::int64_t> parse_numbers(std::string_view text);

// "1024K", "32M" or "512" in bytes; 0 if it is none of these.
std::size_t parse_size(std::string_view text);

class SystemFiles {
 public:
  // The root of the running system, or of a recorded one: a directory with sys and proc.
  explicit SystemFiles(std::string root) : root_(std::move(root)) {}

  // Paths are without a slash in front: "proc/meminfo".
  std::string text(const std::string& path) const;  // the first 256 KiB
  std::string line(const std::string& path) const;  // the first
  std::optional<std::int64_t> number(const std::string& path) const;
  std::vector<int> list(const std::string& path) const { return parse_list(line(path)); }
  // What follows `name` and a colon at the start of a line, without the blanks around it.
  std::string field(const std::string& path, std::string_view name) const;
  // N, ascending, of all entries <prefix>N of a folder.
  std::vector<int> numbered(const std::string& folder, std::string_view prefix) const;

 private:
  std::string root_;
};

// What control groups, versions 1 and 2, leave a process: the tightest limits of its own and all above it.
struct CgroupLimits {
  double cpus = 0;         // CPU time per time; 0: no limit
  std::size_t memory = 0;  // bytes; 0: no limit
};

CgroupLimits cgroup_limits(const SystemFiles& files);

// The CPUs that the calling thread may run on, also where a machine has more than 1024.
// Ascending; empty where the kernel does not tell.
std::vector<int> affinity();

// Lets the calling thread run on these alone. False where the kernel refuses; no CPUs: nothing is asked.
bool set_affinity(std::span<const int> cpus) noexcept;

}  // namespace kt
