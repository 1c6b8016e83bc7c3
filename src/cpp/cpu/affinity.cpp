#include "cpu/affinity.h"

#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>

namespace kt {

namespace {

constexpr std::size_t kBits = 8 * sizeof(unsigned long);
constexpr std::size_t kMostWords = (std::size_t{1} << 20) / kBits;

}  // namespace

CpuMask mask_of(std::span<const int> cpus) {
  CpuMask mask;
  for (const int cpu : cpus) {
    const auto bit = static_cast<std::size_t>(cpu);
    mask.resize(std::max(mask.size(), bit / kBits + 1));
    mask[bit / kBits] |= 1UL << bit % kBits;
  }
  return mask;
}

std::vector<int> cpus_of(const CpuMask& mask) {
  std::vector<int> cpus;
  for (std::size_t bit = 0; bit < mask.size() * kBits; ++bit)
    if (mask[bit / kBits] >> bit % kBits & 1) cpus.push_back(static_cast<int>(bit));
  return cpus;
}

// The mask grows until the kernel accepts it: machines with more than 1024 CPUs exist.
CpuMask current_mask() {
  for (CpuMask mask(1024 / kBits); mask.size() <= kMostWords; mask.resize(2 * mask.size())) {
    const long bytes = ::syscall(SYS_sched_getaffinity, 0, mask.size() * sizeof(mask[0]), mask.data());
    if (bytes < 0) continue;
    mask.resize(static_cast<std::size_t>(bytes) / sizeof(mask[0]));
    return mask;
  }
  return {};
}

bool set_mask(const CpuMask& mask) {
  return mask.empty() || ::syscall(SYS_sched_setaffinity, 0, mask.size() * sizeof(mask[0]), mask.data()) == 0;
}

}  // namespace kt
