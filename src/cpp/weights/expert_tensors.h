// How checkpoints name the tensors of their experts, of which a new spelling is a row of a table in the .cpp;
// and the tensors of one layer's experts by what they are. Refuses a layer in which one is missing, stored
// twice, or unlike the first of its kind.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "base/weight.h"
#include "weights/checkpoint.h"
#include "weights/json.h"

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

class LayerTensors {
 public:
  struct Member {
    const Entry* entry;
    ExpertName name;
  };

  // Of one root; every name is known to a table. `interleaved`: that gate and up alternate in fused tensors,
  // or not, where somebody knows. Throws ValueError.
  LayerTensors(std::shared_ptr<const Checkpoint> checkpoint, int layer, std::span<const Member> members,
               std::optional<bool> interleaved = std::nullopt);

  const Checkpoint& checkpoint() const { return *checkpoint_; }
  int layer() const { return layer_; }
  bool fused() const { return spelling_->form == Form::fused; }
  std::optional<bool> interleaved() const { return interleaved_; }
  Encoding encoding() const { return encoding_; }
  bool gated() const { return gated_; }
  std::span<const Projection> projections() const { return projections_of(gated_); }
  // Matrices of an expert in a tensor of the projection: gate and up have one where fused.
  int matrices(Projection p) const { return fused() && gated_ && p != Projection::down ? 2 : 1; }
  int experts() const { return experts_; }  // 1 where fused: the names do not tell
  int parts() const { return parts_; }      // of every matrix
  std::size_t nbytes() const { return nbytes_; }

  // Either every matrix has a tensor of the role or none has.
  bool has(Role role) const { return likes_[to_size(role)].has_value(); }
  const Entry& at(int expert, Projection p, Role role, int part = 0) const {
    return *grid_[place(fused() ? 0 : expert, p, role, part)];
  }
  // The layer's first; all have its type, those of the same projection also its shape.
  const Entry& first(Projection p, Role role) const { return at(0, p, role); }
  const Entry& first(Role role) const { return first(projections().front(), role); }

  // All of a tensor.
  template <class T>
  std::span<const T> read(const Entry& entry, Arena& scratch) const {
    T* data = scratch.take<T>(static_cast<index_t>(entry.tensor.nbytes / sizeof(T)));
    checkpoint_->read(entry, 0, {reinterpret_cast<std::byte*>(data), entry.tensor.nbytes});
    return {data, entry.tensor.nbytes / sizeof(T)};
  }

  // The checks of those who know the encoding. The message opens with path, layer and tensor.
  void want_role(Role role, std::string_view called) const;
  void want_shape(Projection p, Role role, const std::vector<index_t>& wanted) const;
  template <class... Args>
  [[noreturn]] void fail(const Entry& entry, std::string_view text, const Args&... args) const {
    throw ValueError(message("{} {}", where(entry.name), message(text, args...)));
  }

 private:
  std::size_t place(int expert, Projection p, Role role, int part) const {
    const auto matrix = to_size(expert) * kt::projections.size() + index_of(p);
    return (matrix * to_size(parts_) + to_size(part)) * kRoleCount + to_size(role);
  }
  std::string where(std::string_view tensor) const;
  void decide_layout(std::span<const Member> members);
  void fill(std::span<const Member> members);
  void check_complete() const;
  void check_alike() const;

  std::shared_ptr<const Checkpoint> checkpoint_;
  int layer_;
  const Spelling* spelling_ = nullptr;
  std::optional<bool> interleaved_;
  Encoding encoding_ = Encoding::any;
  bool gated_ = true;
  int experts_ = 1, parts_ = 1;
  std::size_t nbytes_ = 0;
  std::vector<const Entry*> grid_;
  std::array<std::optional<ExpertName>, kRoleCount> likes_;  // a name of each role that there is
};

}  // namespace kt
