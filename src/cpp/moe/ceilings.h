// What this machine can do at most, measured: the yardstick that `kt-moe bench` holds a layer against.
// A list holds the rates of repetitions that followed one another.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "moe/runtime.h"

namespace kt {

struct Ceilings {
  // FLOP/s of the kernel set's multiply-add on registers alone, on one thread and on all of them; where the
  // set has none, of its micro-kernel in L1.
  std::vector<double> registers_one, registers_all;
  // FLOP/s of the micro-kernel while its operands
  std::vector<double> l1_one, l1_all;  // lie in the L1 cache
  std::vector<double> l2_one, l2_all;  // are A panels that pass by from half the L2, and a B panel that stays
  // Bytes/s read from memory by one thread and by all of them.
  std::vector<double> read_one, read_all;
};

// Takes about `seconds` for each list. Memory is read from `read_bytes` (rounded down to whole chunks, at
// least one a thread), which should be several times the caches.
Ceilings measure_ceilings(Runtime& runtime, double seconds, std::size_t read_bytes);

}  // namespace kt
