#include "moe/layer.h"

#include <cstdlib>
#include <string>

#include "base/error.h"

namespace kt {

Activation activation_from(std::string_view name) {
  std::string known;
  for (const Activation activation : kActivations) {
    if (name == name_of(activation)) return activation;
    known += (known.empty() ? "" : ", ") + std::string(name_of(activation));
  }
  throw ValueError(message("activation is \"{}\", wanted one of {}", name, known));
}

std::string_view name_of(Activation activation) {
  switch (activation) {
    case Activation::silu: return "silu";
    case Activation::gpt_oss: return "gpt_oss";
    case Activation::clamped_silu: return "clamped_silu";
    case Activation::gelu_tanh: return "gelu_tanh";
  }
  return "unknown";
}

const ActivationKernels& kernels_of(const KernelSet& kernels, Activation activation) {
  switch (activation) {
    case Activation::silu: return kernels.epilogue.silu;
    case Activation::gpt_oss: return kernels.epilogue.gpt_oss;
    case Activation::clamped_silu: return kernels.epilogue.clamped_silu;
    case Activation::gelu_tanh: return kernels.epilogue.gelu_tanh;
  }
  std::abort();  // every Activation has its case
}

}  // namespace kt
