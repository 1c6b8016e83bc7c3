// The kernel sets that this CPU runs.
#pragma once

#include <doctest/doctest.h>

#include <string>

#include "cpu/processor.h"
#include "kernels/registry.h"

// body(set) for each.
template <class Body>
void for_every_available_set(const Body& body) {
  for (const kt::KernelEntry& entry : kt::kernel_registry()) {
    if (kt::availability(entry, kt::cpu_features()) != "available") continue;
    CAPTURE(std::string(entry.name));
    body(kt::kernel_set(entry.name, kt::cpu_features()));
  }
}
