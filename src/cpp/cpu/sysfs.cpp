#include "cpu/sysfs.h"

#include <dirent.h>
#include <fcntl.h>
#include <sched.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <memory>

#include "base/view.h"

namespace kt {

namespace {

constexpr std::size_t kMostText = std::size_t{256} << 10;
constexpr std::string_view kBlanks = " \t\r\n";

std::string_view trimmed(std::string_view text) {
  const std::size_t first = text.find_first_not_of(kBlanks);
  if (first == std::string_view::npos) return {};
  return text.substr(first, text.find_last_not_of(kBlanks) - first + 1);
}

// All of the text as one number.
template <class Integer>
std::optional<Integer> whole_number(std::string_view text) {
  Integer value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<int> id_number(std::string_view text) {
  const std::optional<int> id = whole_number<int>(text);
  return id && *id >= 0 && *id < kMostIds ? id : std::nullopt;
}

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
    const auto limit = to_size(bytes);
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

struct FreeMask {
  void operator()(cpu_set_t* mask) const { CPU_FREE(mask); }
};
using Mask = std::unique_ptr<cpu_set_t, FreeMask>;

}  // namespace

std::vector<int> parse_list(std::string_view text) {
  std::vector<bool> named;
  // A list without repetitions names no more than all; one that repeats itself must not take for ever.
  int left = kMostIds;
  while (!text.empty() && left > 0) {
    const std::size_t comma = std::min(text.find(','), text.size());
    const std::string_view part = trimmed(text.substr(0, comma));
    text.remove_prefix(std::min(comma + 1, text.size()));
    const std::size_t dash = std::min(part.find('-'), part.size());
    const std::optional<int> first = id_number(part.substr(0, dash));
    const std::optional<int> last = dash == part.size() ? first : id_number(part.substr(dash + 1));
    if (!first || !last || *last < *first) continue;
    if (named.size() <= to_size(*last)) named.resize(to_size(*last) + 1);
    std::fill(named.begin() + *first, named.begin() + *last + 1, true);
    left -= *last - *first + 1;
  }
  std::vector<int> ids;
  for (std::size_t id = 0; id < named.size(); ++id)
    if (named[id]) ids.push_back(to_int(id));
  return ids;
}

std::vector<std::int64_t> parse_numbers(std::string_view text) {
  std::vector<std::int64_t> numbers;
  for (text = trimmed(text); !text.empty(); text = trimmed(text)) {
    const std::size_t end = std::min(text.find_first_of(kBlanks), text.size());
    const auto value = whole_number<std::int64_t>(text.substr(0, end));
    if (!value) break;
    numbers.push_back(*value);
    text.remove_prefix(end);
  }
  return numbers;
}

std::size_t parse_size(std::string_view text) {
  text = trimmed(text);
  if (text.empty()) return 0;
  const int shift = text.back() == 'K' ? 10 : text.back() == 'M' ? 20 : 0;
  if (shift != 0) text.remove_suffix(1);
  const auto value = whole_number<std::uint32_t>(text);
  return value ? std::size_t{*value} << shift : 0;
}

std::string SystemFiles::text(const std::string& path) const {
  // Not to wait where a recorded tree has a pipe.
  const int file = ::open((root_ + "/" + path).c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file < 0) return {};
  std::string text;
  char buffer[4096];
  ssize_t got = 0;
  while (text.size() < kMostText && (got = ::read(file, buffer, sizeof buffer)) > 0)
    text.append(buffer, to_size(got));
  ::close(file);
  return text;
}

std::string SystemFiles::line(const std::string& path) const {
  const std::string all = text(path);
  return all.substr(0, all.find('\n'));
}

std::optional<std::int64_t> SystemFiles::number(const std::string& path) const {
  const std::string first = line(path);
  return whole_number<std::int64_t>(trimmed(first));
}

std::string SystemFiles::field(const std::string& path, std::string_view name) const {
  const std::string all = text(path);
  for (std::string_view rest = all; !rest.empty();) {
    const std::size_t end = std::min(rest.find('\n'), rest.size());
    const std::string_view row = rest.substr(0, end);
    rest.remove_prefix(std::min(end + 1, rest.size()));
    const std::size_t colon = row.find(':');
    if (colon != std::string_view::npos && trimmed(row.substr(0, colon)) == name)
      return std::string(trimmed(row.substr(colon + 1)));
  }
  return {};
}

std::vector<int> SystemFiles::numbered(const std::string& folder, std::string_view prefix) const {
  std::vector<int> found;
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir((root_ + "/" + folder).c_str()), ::closedir);
  while (const dirent* entry = dir ? ::readdir(dir.get()) : nullptr) {
    const std::string_view name = entry->d_name;
    if (!name.starts_with(prefix)) continue;
    const std::string_view digits = name.substr(prefix.size());
    if (digits.size() > 1 && digits.front() == '0') continue;
    if (const std::optional<int> id = id_number(digits)) found.push_back(*id);
  }
  std::ranges::sort(found);
  return found;
}

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

std::vector<int> affinity() {
  // The mask grows until the kernel accepts it.
  for (int most = CPU_SETSIZE; most <= kMostIds; most *= 2) {
    const Mask mask(CPU_ALLOC(most));
    const std::size_t bytes = CPU_ALLOC_SIZE(most);
    if (!mask || sched_getaffinity(0, bytes, mask.get()) != 0) continue;
    std::vector<int> cpus;
    for (int cpu = 0; cpu < most; ++cpu)
      if (CPU_ISSET_S(cpu, bytes, mask.get())) cpus.push_back(cpu);
    return cpus;
  }
  return {};
}

bool set_affinity(std::span<const int> cpus) noexcept {
  if (cpus.empty()) return true;
  const auto [lowest, highest] = std::ranges::minmax(cpus);
  if (lowest < 0 || highest >= kMostIds) return false;
  const Mask mask(CPU_ALLOC(highest + 1));
  if (!mask) return false;
  const std::size_t bytes = CPU_ALLOC_SIZE(highest + 1);
  CPU_ZERO_S(bytes, mask.get());
  for (const int cpu : cpus) CPU_SET_S(cpu, bytes, mask.get());
  return sched_setaffinity(0, bytes, mask.get()) == 0;
}

}  // namespace kt
