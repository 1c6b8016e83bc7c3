#include "kernels/registry.h"

#include <algorithm>
#include <array>

#include "base/error.h"
#include "cpu/processor.h"

namespace kt {

namespace scalar {
extern const KernelSet table;
}
namespace avx2 {
extern const KernelSet table;
}
namespace avx512 {
extern const KernelSet table;
}
namespace avx512_bf16 {
extern const KernelSet table;
}

namespace amx {
extern const KernelSet table;
}

namespace {

// From the slowest, which runs everywhere, to the fastest.
const auto& registry() {
  static const std::array entries{
      KernelEntry{"scalar", 0, &scalar::table},
      KernelEntry{"avx2", features_named({"avx2"}), &avx2::table},
      KernelEntry{"avx512", features_named({"avx2", "avx512"}), &avx512::table},
      KernelEntry{"avx512_bf16", features_named({"avx2", "avx512", "avx512_bf16"}), &avx512_bf16::table},
      KernelEntry{"amx", features_named({"avx2", "avx512", "avx512_bf16", "amx_bf16"}), &amx::table},
  };
  return entries;
}

// Whether the operating system lets this process use the entry's registers: it is asked.
bool permitted(const KernelEntry& entry) {
  return (entry.needs & features_named({"amx_bf16"})) == 0 || request_tiles();
}

std::string known_names() {
  std::string names;
  for (const KernelEntry& entry : registry()) names += (names.empty() ? "" : ", ") + std::string(entry.name);
  return names;
}

template <class Slot>
void fill(Slot& slot, Slot own) {
  if (own != nullptr) slot = own;
}

void overlay(KernelSet& set, const KernelSet& own) {
  if (own.gemm.micro_kernel != nullptr) set.gemm = own.gemm;
  if (own.gemv.nn != nullptr) set.gemv = own.gemv;
  fill(set.epilogue.transpose, own.epilogue.transpose);
  fill(set.epilogue.sum_scaled, own.epilogue.sum_scaled);
  fill(set.epilogue.round_scaled, own.epilogue.round_scaled);
  fill(set.epilogue.activations, own.epilogue.activations);
  fill(set.decode.from_f32, own.decode.from_f32);
  fill(set.decode.from_f16, own.decode.from_f16);
  for (int type = 0; type < kCodeTypes; ++type)
    fill(set.decode.from_codes[type], own.decode.from_codes[type]);
}

}  // namespace

std::span<const KernelEntry> kernel_registry() { return registry(); }

const KernelEntry& kernel_entry(std::string_view isa) {
  const auto found = std::ranges::find(registry(), isa, &KernelEntry::name);
  KT_CHECK(found != registry().end(), "isa is \"{}\", wanted one of {}", isa, known_names());
  return *found;
}

std::string availability(const KernelEntry& entry, unsigned features) {
  if (const unsigned missing = entry.needs & ~features; missing != 0) {
    std::string names;
    for (const std::string& name : feature_names(missing)) names += (names.empty() ? "" : ", ") + name;
    return "this CPU lacks " + names;
  }
  return entry.own == nullptr ? "no kernels in this version" : "available";
}

std::string_view best_isa(unsigned features) {
  std::string_view best;
  for (const KernelEntry& entry : registry())
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
  for (const KernelEntry& entry : registry()) {
    if (entry.own != nullptr) overlay(set, *entry.own);
    if (entry.name == isa) break;
  }
  return set;
}

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

}  // namespace kt
