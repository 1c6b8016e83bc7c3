// The CPUs that a thread may run on, also where a machine has more than 1024.
#pragma once

#include <span>
#include <vector>

namespace kt {

// Of the calling thread, ascending; empty where the kernel does not tell.
std::vector<int> affinity();

// Lets the calling thread run on these alone. False where the kernel refuses; no CPUs: nothing is asked.
bool set_affinity(std::span<const int> cpus) noexcept;

}  // namespace kt
