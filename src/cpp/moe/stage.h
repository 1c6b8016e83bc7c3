// The steps of a layer's forward and backward pass, as the profiler times them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kt {

enum class Stage : std::uint8_t {
  setup,            // what the caller does alone: list tasks, free memory
  route,            // routes by expert
  fetch,            // weights that are not in memory
  gather,           // rows of X or dY, packed
  lora_p,           // P = s X A'
  pack,             // weights, packed
  decode,           // codes to bf16, and packed
  gate_up,          // G, U
  activation,       // h
  hidden,           // h, packed
  down,             // h Wd' + Pd Bd'
  merge,            // sums over a token's routes, and over shards
  grad_down,        // dh'
  grad_activation,  // dG, dU
  dots,             // the gradient of the routing weights
  gather_grad,      // dG, dU, packed
  lora_q,           // Q = s dY B
  grad_hidden,      // dX
  lora_grad,        // dA, dB
  clear,            // zeros for experts without routes
  wait,             // for what other threads make
  idle,             // before a thread's first and behind its last task of a call
};

inline constexpr std::array<std::string_view, 22> stage_names{
    "setup",     "route",           "fetch",      "gather",      "lora_p", "pack",
    "decode",    "gate_up",         "activation", "hidden",      "down",   "merge",
    "grad_down", "grad_activation", "dots",       "gather_grad", "lora_q", "grad_hidden",
    "lora_grad", "clear",           "wait",       "idle"};
inline constexpr std::size_t kStages = stage_names.size();
static_assert(kStages == static_cast<std::size_t>(Stage::idle) + 1);

constexpr std::string_view name_of(Stage stage) { return stage_names[static_cast<std::size_t>(stage)]; }

}  // namespace kt
