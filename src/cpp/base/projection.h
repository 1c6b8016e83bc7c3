// The three weight matrices of an expert.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kt {

enum class Projection : std::uint8_t { gate, up, down };

inline constexpr std::array projections{Projection::gate, Projection::up, Projection::down};

// For arrays with one element a projection.
constexpr std::size_t index_of(Projection p) { return static_cast<std::size_t>(p); }

constexpr std::string_view name_of(Projection p) {
  switch (p) {
    case Projection::gate: return "gate";
    case Projection::up: return "up";
    case Projection::down: return "down";
  }
  return "unknown";
}

}  // namespace kt
