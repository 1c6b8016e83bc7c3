#include "moe/layer.h"

#include <cstdlib>

#include "base/error.h"
#include "moe/cost.h"
#include "moe/routing.h"

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

bool computes_whole(const Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs) {
  if (experts.placement != Placement::automatic) return experts.placement == Placement::expert;
  LayerCall call;
  call.tokens = inputs.hidden_states.rows, call.hidden = experts.hidden;
  call.intermediate = experts.intermediate;
  const Routing routing = route(inputs.topk_ids, experts.num_experts);
  for (int e = 0; e < experts.num_experts; ++e) call.routes.push_back(routing.count(e));
  for (const Projection p : projections) {
    call.ranks[index_of(p)] = inputs.of(p).rank();
    call.weight_bytes[index_of(p)] = static_cast<double>(experts.of(p, 0).bytes());
  }
  return choose(call, {experts.shards, experts.homes}, runtime.rates()) == Mode::expert;
}

}  // namespace kt
