#include "kernels/registry.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "cpu/processor.h"

namespace kt {

#define KT_SET(isa)                \
  namespace isa {                  \
  extern const OwnKernels kernels; \
  }
KT_SET(scalar)
KT_SET(avx2)
KT_SET(avx512)
KT_SET(avx512_bf16)
KT_SET(amx)

std::span<const KernelEntry> kernel_registry() {
  static const std::array entries{
      KernelEntry{"scalar", 0, &scalar::kernels},
      KernelEntry{"avx2", features_named({"avx2"}), &avx2::kernels},
      KernelEntry{"avx512", features_named({"avx2", "avx512"}), &avx512::kernels},
      KernelEntry{"avx512_bf16", features_named({"avx2", "avx512", "avx512_bf16"}), &avx512_bf16::kernels},
      KernelEntry{"amx", features_named({"avx2", "avx512", "avx512_bf16", "amx_bf16"}), &amx::kernels},
  };
  return entries;
}

namespace {

// Whether the operating system lets this process use the entry's registers: it is asked.
bool permitted(const KernelEntry& entry) {
  return (entry.needs & features_named({"amx_bf16"})) == 0 || request_tiles();
}

template <class Slot>
void fill(Slot& slot, Slot own) {
  if (own != nullptr) slot = own;
}

void overlay(KernelSet& set, const OwnKernels& own) {
  if (own.gemm != nullptr) set.gemm = *own.gemm;
  if (own.gemv != nullptr) set.gemv = *own.gemv;
  if (const EpilogueKernels* epilogue = own.epilogue; epilogue != nullptr) {
    fill(set.epilogue.transpose, epilogue->transpose);
    fill(set.epilogue.sum_scaled, epilogue->sum_scaled);
    fill(set.epilogue.round_scaled, epilogue->round_scaled);
    fill(set.epilogue.activations, epilogue->activations);
  }
  if (const DecodeKernels* decode = own.decode; decode != nullptr) {
    fill(set.decode.from_f32, decode->from_f32);
    fill(set.decode.from_f16, decode->from_f16);
    for (int type = 0; type < kCodeTypes; ++type) fill(set.decode.from_codes[type], decode->from_codes[type]);
  }
}

}  // namespace

const KernelEntry& kernel_entry(std::string_view isa) {
  const auto all = kernel_registry();
  const auto found = std::ranges::find(all, isa, &KernelEntry::name);
  KT_CHECK(found != all.end(), "isa is \"{}\", wanted one of {}", isa, joined(all, &KernelEntry::name));
  return *found;
}

std::string availability(const KernelEntry& entry, unsigned features) {
  const unsigned missing = entry.needs & ~features;
  return missing == 0 ? "available" : "this CPU lacks " + joined(feature_names(missing));
}

std::string_view best_isa(unsigned features) {
  std::string_view best;
  for (const KernelEntry& entry : kernel_registry())
    if (availability(entry, features) == "available") best = entry.name;
  return best;
}

std::string_view best_permitted_isa(unsigned features) {
  const std::string_view best = best_isa(features);
  if (permitted(kernel_entry(best))) return best;
  return best_isa(features & ~features_named({"amx_bf16"}));
}

KernelSet kernel_set(std::string_view isa, unsigned features) {
  const std::string verdict = availability(kernel_entry(isa), features);
  KT_CHECK(verdict == "available", "isa is \"{}\": {}", isa, verdict);
  KT_CHECK(permitted(kernel_entry(isa)),
           "isa is \"{}\": the operating system refuses its registers to this process", isa);
  KernelSet set{};
  for (const KernelEntry& entry : kernel_registry()) {
    overlay(set, *entry.own);
    if (entry.name == isa) break;
  }
  return set;
}

Activation activation_from(std::string_view name) {
  for (int a = 0; a < kActivationCount; ++a)
    if (name == kActivationNames[a]) return static_cast<Activation>(a);
  throw ValueError(message("activation is \"{}\", wanted one of {}", name, joined(kActivationNames)));
}

std::string_view name_of(Activation activation) {
  return kActivationNames[static_cast<std::size_t>(activation)];
}

}  // namespace kt
