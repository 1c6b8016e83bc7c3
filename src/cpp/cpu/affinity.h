// The CPUs that the calling thread may run on.
#pragma once

#include <span>
#include <vector>

namespace kt {

// Bit i % 64 of word i / 64 is CPU i, as the kernel has it. Empty: none, or not known.
using CpuMask = std::vector<unsigned long>;

CpuMask mask_of(std::span<const int> cpus);
std::vector<int> cpus_of(const CpuMask& mask);

CpuMask current_mask();
// False where the kernel refuses: none of those CPUs is there, or may be used. Nothing is done for an empty
// one.
bool set_mask(const CpuMask& mask);

}  // namespace kt
