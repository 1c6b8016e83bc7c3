#include "moe/layer.h"

#include <cstddef>
#include <string>

#include "base/error.h"

namespace kt {

Activation activation_from(std::string_view name) {
  std::string known;
  for (int a = 0; a < kActivationCount; ++a) {
    if (name == kActivationNames[a]) return static_cast<Activation>(a);
    known += (known.empty() ? "" : ", ") + std::string(kActivationNames[a]);
  }
  throw ValueError(message("activation is \"{}\", wanted one of {}", name, known));
}

std::string_view name_of(Activation activation) {
  return kActivationNames[static_cast<std::size_t>(activation)];
}

const ActivationKernels& kernels_of(const KernelSet& kernels, Activation activation) {
  return kernels.epilogue.activations[static_cast<std::size_t>(activation)];
}

}  // namespace kt
