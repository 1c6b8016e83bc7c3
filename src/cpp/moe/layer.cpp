#include "moe/layer.h"

#include <cstdlib>

#include "base/error.h"

namespace kt {

Activation activation_from(std::string_view name) {
  for (const Activation activation : {Activation::silu, Activation::gpt_oss})
    if (name == name_of(activation)) return activation;
  throw ValueError(message("activation is \"{}\", wanted \"silu\" or \"gpt_oss\"", name));
}

std::string_view name_of(Activation activation) {
  switch (activation) {
    case Activation::silu: return "silu";
    case Activation::gpt_oss: return "gpt_oss";
  }
  return "unknown";
}

const ActivationKernels& kernels_of(const KernelSet& kernels, Activation activation) {
  switch (activation) {
    case Activation::silu: return kernels.epilogue.silu;
    case Activation::gpt_oss: return kernels.epilogue.gpt_oss;
  }
  std::abort();  // every Activation has its case
}

}  // namespace kt
