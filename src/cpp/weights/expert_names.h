// How checkpoints name the tensors of their experts. A new spelling is a row of a table in the .cpp.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/projection.h"

namespace kt {

// Families of names. Those of `fused` have no expert's number: the tensor's first dimension is the expert.
enum class Naming : std::uint8_t { gate_up_down, w1_w3_w2, fused, kt };

// What the tensors' tails tell of how a matrix is stored; `any`: nothing.
enum class Encoding : std::uint8_t { any, plain, packed, gptq, mxfp4, kt };

// What a tensor is to its matrix. order: the group of each column; unused: scales of activations.
enum class Role : std::uint8_t { weight, scale, zeros, shape, order, bias, unused };

inline constexpr std::size_t kRoleCount = 7;

// The end of a tensor's name.
struct Tail {
  std::string_view text;
  Encoding encoding;
  Role role;
};

// What the name of a tensor among the experts of a layer says.
struct ExpertName {
  int layer;
  std::string_view root;       // what precedes the experts: "model.layers.3.mlp"
  const Tail* tail = nullptr;  // nullptr: no table knows the name; what follows says nothing then
  Naming naming{};
  Projection first{}, last{};  // the matrices in it: one, or gate and up
  int expert = 0;
  int part = 0;  // of a matrix that is cut into several tensors
};

// nullopt for every other tensor. Views into `name`.
std::optional<ExpertName> parse_expert_name(std::string_view name);

// The name of the tensor that is to matrix `p` of an expert what `like` is to its own.
std::string tensor_name(const ExpertName& like, Projection p, int expert, int part);

// Why a name that no table knows cannot be read, as far as it tells.
std::string unsupported_format(std::string_view name);

}  // namespace kt
