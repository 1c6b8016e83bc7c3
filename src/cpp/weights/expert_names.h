// How checkpoints name the tensors of their experts. A new family of names is a row of the table in the .cpp.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>

#include "base/projection.h"

namespace kt {

// How one family of checkpoints names the experts of a layer.
struct Scheme {
  // Rows `part` of `parts` of the tensor whose name ends in `tail`. "{expert}" in the tail stands for the
  // expert's number; without it the tensor's first dimension is the expert.
  struct Place {
    std::string_view tail;
    int part = 0, parts = 1;

    bool fused() const { return tail.find("{expert}") == tail.npos; }
  };

  std::string_view layout;
  std::array<Place, projections.size()> places;  // gate, up, down

  const Place& place(Projection p) const { return places[index_of(p)]; }
};

// What the name of a tensor among the experts of a layer says.
struct ExpertName {
  int layer;
  std::string_view root;           // what precedes the scheme's tail: "model.layers.3.mlp"
  const Scheme* scheme = nullptr;  // nullptr: none knows the name
  std::optional<int> expert;       // none in a fused tensor's name
};

// nullopt for every other tensor. Views into `name`.
std::optional<ExpertName> parse_expert_name(std::string_view name);

std::string tensor_name(std::string_view root, const Scheme::Place& place, int expert);

// Why a name that no scheme knows cannot be read, as far as it tells.
std::string unsupported_format(std::string_view name);

}  // namespace kt
