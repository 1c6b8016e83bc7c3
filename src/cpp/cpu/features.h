// What this CPU and its operating system can run.
#pragma once

#include <string>
#include <vector>

namespace kt {

enum class Feature : unsigned {
  none = 0,
  avx2 = 1,         // AVX2, FMA, F16C
  avx512 = 2,       // AVX-512 F, BW, VL, DQ
  avx512_bf16 = 4,  // VDPBF16PS
  amx_bf16 = 8,     // AMX tiles with TDPBF16PS, as the CPU reports it; the kernel's permission is asked later
};

constexpr unsigned operator|(Feature a, Feature b) {
  return static_cast<unsigned>(a) | static_cast<unsigned>(b);
}
constexpr unsigned operator|(unsigned a, Feature b) { return a | static_cast<unsigned>(b); }

// Bits of Feature; a bit is set only when the registers it needs are saved by the operating system too.
unsigned cpu_features();

// Linux lets a process use AMX tiles after it has asked (Documentation/arch/x86/xstate.rst), and from then on
// keeps 8 KiB more for every thread that uses them. Threads inherit the leave. False: it refuses.
bool request_tiles();

std::vector<std::string> feature_names(unsigned features);

// What /proc/cpuinfo calls the instructions behind them.
std::vector<std::string> cpuinfo_flags(unsigned features);

}  // namespace kt
