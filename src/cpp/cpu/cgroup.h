// What control groups leave a process: the tightest limits of its own and all above it. Versions 1 and 2.
#pragma once

#include <cstddef>

#include "cpu/sysfs.h"

namespace kt {

struct CgroupLimits {
  double cpus = 0;         // CPU time per time; 0: no limit
  std::size_t memory = 0;  // bytes; 0: no limit
};

CgroupLimits cgroup_limits(const SystemFiles& files);

}  // namespace kt
