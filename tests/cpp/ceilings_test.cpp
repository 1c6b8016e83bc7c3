#include "moe/ceilings.h"

#include <doctest/doctest.h>

#include <cmath>

#include "cpu/processor.h"
#include "kernels/registry.h"

using namespace kt;

// Rates depend on the machine; what must hold everywhere is that there are some.
TEST_CASE("every kernel set has ceilings, on one thread and on more than there are cores") {
  for (const KernelEntry& entry : kernel_registry()) {
    if (availability(entry, cpu_features()) != "available") continue;
    CAPTURE(std::string(entry.name));
    for (const int threads : {1, 3}) {
      Runtime runtime(threads, std::nullopt, std::string(entry.name));
      const Ceilings c = measure_ceilings(runtime, 0.001, std::size_t{4} << 20);
      for (const auto* list : {&c.registers_one, &c.registers_all, &c.l1_one, &c.l1_all, &c.l2_one, &c.l2_all,
                               &c.read_one, &c.read_all}) {
        CHECK(list->size() == 7);
        for (const double rate : *list) CHECK((std::isfinite(rate) && rate > 0));
      }
    }
  }
}

TEST_CASE("memory to read: at least a chunk for every thread") {
  Runtime runtime(2, std::nullopt, "scalar");
  CHECK(measure_ceilings(runtime, 0.001, 0).read_all.front() > 0);
}
