#include "moe/layer.h"

#include <cstdlib>

#include "base/error.h"

namespace kt {

Activation activation_from(std::string_view name) {
  KT_CHECK(name == "silu", "activation is \"{}\", wanted \"silu\"", name);
  return Activation::silu;
}

std::string_view name_of(Activation activation) {
  switch (activation) {
    case Activation::silu: return "silu";
  }
  return "unknown";
}

const ActivationKernels& kernels_of(const KernelSet& kernels, Activation activation) {
  switch (activation) {
    case Activation::silu: return kernels.epilogue.silu;
  }
  std::abort();  // every Activation has its case
}

}  // namespace kt
