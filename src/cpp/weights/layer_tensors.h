// The tensors of one layer's experts by what they are. Refuses a layer in which one is missing, stored twice,
// or unlike the first of its kind.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "base/weight.h"
#include "weights/checkpoint.h"
#include "weights/expert_names.h"
#include "weights/json.h"

namespace kt {

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
  bool has(Role role) const { return likes_[static_cast<std::size_t>(role)].has_value(); }
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
    const auto matrix = static_cast<std::size_t>(expert) * kt::projections.size() + index_of(p);
    return (matrix * static_cast<std::size_t>(parts_) + static_cast<std::size_t>(part)) * kRoleCount +
           static_cast<std::size_t>(role);
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
