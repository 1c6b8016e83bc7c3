// All that is x86 outside kernels/: what the CPU and its operating system can run, a clock that costs a few
// nanoseconds to read, how a thread spins, rounds and writes past the caches.
#pragma once

#include <x86intrin.h>

#include <chrono>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

namespace kt {

// Features are bits, each for some instructions of the CPU: a row of the table in processor.cpp.
unsigned features_named(std::initializer_list<std::string_view> names);

// Those of this CPU; a bit is set only when the registers it needs are saved by the operating system too. AMX
// tiles also want its permission, which is asked later.
unsigned cpu_features();

// Linux lets a process use AMX tiles after it has asked (Documentation/arch/x86/xstate.rst), and from then on
// keeps 8 KiB more for every thread that uses them. Threads inherit the permission. False: it refuses.
bool request_tiles();

std::vector<std::string> feature_names(unsigned features);

// What /proc/cpuinfo calls the instructions behind them.
std::vector<std::string> cpuinfo_flags(unsigned features);

// What a thread does that waits in a loop.
inline void spin() { _mm_pause(); }

// Sets memory to zero past the caches, so that no line is fetched only to be overwritten.
void stream_zeros(char* to, std::size_t bytes);

// Rounding to nearest, denormals kept, during its life: what a thread was set to before must not decide the
// bits of a result.
class UsualFloats {
 public:
  UsualFloats() { _mm_setcsr(0x1f80); }
  ~UsualFloats() { _mm_setcsr(before_); }
  UsualFloats(const UsualFloats&) = delete;
  UsualFloats& operator=(const UsualFloats&) = delete;

 private:
  unsigned before_ = _mm_getcsr();
};

using Ticks = std::int64_t;

// CPUID 0x80000007, EDX bit 8: the counter ticks at one rate, whatever the power state and frequency.
bool invariant_tsc();

// The CPU's time stamp counter, where it ticks evenly in every state of the CPU, else
// std::chrono::steady_clock.
class TickClock {
 public:
  explicit TickClock(bool tsc = invariant_tsc()) : tsc_(tsc), begin_(read()) {}

  Ticks now() const { return tsc_ ? static_cast<Ticks>(__rdtsc()) : wall(); }
  Ticks begin() const { return begin_.ticks; }  // when it was made
  bool tsc() const { return tsc_; }

  // By the wall time since it was made; of at least kLeast, for which a younger clock waits.
  double seconds_per_tick() const {
    Pair end = read();
    while (end.wall - begin_.wall < kLeast) end = read();
    return tsc_ ? 1e-9 * static_cast<double>(end.wall - begin_.wall) /
                      static_cast<double>(end.ticks - begin_.ticks)
                : 1e-9;
  }

 private:
  static constexpr Ticks kLeast = 2'000'000;  // ns: 10^4 times what a pair is off by

  struct Pair {
    Ticks ticks, wall;
  };

  static Ticks wall() {  // ns
    using namespace std::chrono;
    return duration_cast<nanoseconds>(steady_clock::now().time_since_epoch()).count();
  }

  // Both clocks at one time: of some tries the one least disturbed.
  Pair read() const {
    Pair best{};
    Ticks least = 0;
    for (int i = 0; i < 5; ++i) {
      const Ticks before = now(), time = wall(), after = now();
      if (i > 0 && after - before >= least) continue;
      least = after - before;
      best = {before + least / 2, time};
    }
    return best;
  }

  bool tsc_;
  Pair begin_;
};

}  // namespace kt
