// Which kernel sets exist, which this CPU can run, and the complete table of one of them; and the names of
// activations.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>

#include "kernels/kernel_set.h"

namespace kt {

struct KernelEntry {
  std::string_view name;
  unsigned needs;  // bits of features
  const OwnKernels* own;
};

// From the slowest, which runs everywhere, to the fastest.
std::span<const KernelEntry> kernel_registry();

// ValueError for a name that is not known.
const KernelEntry& kernel_entry(std::string_view isa);

// "available", or why this entry cannot run with these features.
std::string availability(const KernelEntry& entry, unsigned features);

// The fastest available one.
std::string_view best_isa(unsigned features);
// The same, but of those that the operating system permits; which it is asked for that one alone.
std::string_view best_permitted_isa(unsigned features);

// The table of `isa`: slots it leaves empty come from the sets before it. ValueError when unknown or not
// available, or not permitted by the operating system, which is asked.
KernelSet kernel_set(std::string_view isa, unsigned features);

// ValueError for a name that is not known.
Activation activation_from(std::string_view name);
std::string_view name_of(Activation activation);

// fp16 to fp32, exact, as all sets have it.
namespace scalar {
float half_to_float(std::uint16_t half);
}

}  // namespace kt
