// A clock that costs a few nanoseconds to read: the CPU's time stamp counter, where it ticks evenly in every
// state of the CPU, else std::chrono::steady_clock.
#pragma once

#include <cpuid.h>
#include <x86intrin.h>

#include <chrono>
#include <cstdint>

namespace kt {

using Ticks = std::int64_t;

// CPUID 0x80000007, EDX bit 8: the counter ticks at one rate, whatever the power state and frequency.
inline bool invariant_tsc() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0x80000007u, &eax, &ebx, &ecx, &edx) != 0 && (edx >> 8 & 1u) != 0;
}

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
