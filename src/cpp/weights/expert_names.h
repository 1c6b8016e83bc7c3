// How checkpoints name the tensors of their experts. A new spelling is a row of a table in the .cpp.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/error.h"
#include "base/weight.h"

namespace kt {

// What follows the list of a layer's experts in a name: {expert}.{word}.{tail}, {word}{tail} with the expert
// as the tensor's first dimension and gate and up in one tensor, or {word}.{expert}.numa.{part}.{tail}.
enum class Form : std::uint8_t { per_expert, fused, kt };

struct Spelling {
  Form form;
  std::array<std::string_view, projections.size()> words;  // of gate, up and down
  std::optional<bool> gated = true;                        // whether there is a gate; none: as the files tell
};

// The experts of one module as somebody who knows the model says they are called.
struct ExpertList {
  std::string prefix;            // of all names: "model.layers.3.block_sparse_moe.experts"
  Form form = Form::per_expert;  // or fused
  std::array<std::string, projections.size()> words;  // gate's and up's are alike where fused; no gate: ""
  int first_expert = 0, num_experts = 0;              // the numbers that belong to the module, per_expert
  std::optional<bool> interleaved = std::nullopt;     // gate and up alternate, fused; none: as the files tell

  Spelling spelling() const {  // with views of the words
    return {form, {words[0], words[1], words[2]}, !words[0].empty()};
  }
};

// What the tensors' tails tell of how a matrix is stored; `any`: nothing.
enum class Encoding : std::uint8_t { any, plain, packed, gptq, mxfp4, kt };

// What a tensor is to its matrix. order: the group of each column; unused: scales of activations.
enum class Role : std::uint8_t { weight, scale, global_scale, zeros, shape, order, bias, unused };

inline constexpr std::size_t kRoleCount = 8;

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
  std::string_view list;       // what precedes the expert's number or the word
  const Spelling* spelling = nullptr;
  Projection first{}, last{};  // the matrices in it: one, or gate and up
  int expert = 0;
  int part = 0;  // of a matrix that is cut into several tensors
};

// nullopt for every other tensor. Views into `name`.
std::optional<ExpertName> parse_expert_name(std::string_view name);

// The same of a name that begins with the list's prefix and a dot; nullopt where it is no tensor of these
// experts. The layer is left open. `spelling` is the list's.
std::optional<ExpertName> parse_listed_name(std::string_view name, const ExpertList& list,
                                            const Spelling& spelling);

// "a.b.3": segments of a name, words and numbers.
template <class... Segments>
std::string dotted(const Segments&... segments) {
  std::string name;
  ((name += name.empty() ? message("{}", segments) : message(".{}", segments)), ...);
  return name;
}

// The name of the tensor that is to matrix `p` of an expert what `like` is to its own.
std::string tensor_name(const ExpertName& like, Projection p, int expert, int part);

// Why a name that no table knows cannot be read, as far as it tells.
std::string unsupported_format(std::string_view name);

}  // namespace kt
