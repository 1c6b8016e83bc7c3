#include "weights/layer_tensors.h"

#include <algorithm>
#include <utility>

namespace kt {

LayerTensors::LayerTensors(std::shared_ptr<const Checkpoint> checkpoint, int layer,
                           std::span<const Member> members, std::optional<bool> interleaved)
    : checkpoint_(std::move(checkpoint)), layer_(layer), interleaved_(interleaved) {
  decide_layout(members);
  fill(members);
  KT_CHECK(has(Role::weight), "{}: layer {} has tensors such as {} but no weights beside them",
           quote(checkpoint_->path().native()), layer_, quote(members.front().entry->name));
  check_complete();
  check_alike();
}

std::string LayerTensors::where(std::string_view tensor) const {
  return message("{}: layer {}: tensor {}", quote(checkpoint_->path().native()), layer_, quote(tensor));
}

void LayerTensors::decide_layout(std::span<const Member> members) {
  spelling_ = members.front().name.spelling;
  for (const auto& [entry, name] : members) {
    const Encoding encoding = name.tail->encoding;
    if (encoding_ == Encoding::any) encoding_ = encoding;
    KT_CHECK(name.spelling == spelling_ && (encoding == Encoding::any || encoding == encoding_),
             "{}: layer {} is stored in two layouts; {} belongs to the second",
             quote(checkpoint_->path().native()), layer_, quote(entry->name));
  }
  gated_ = spelling_->gated.value_or(std::ranges::any_of(
      members, [](const Member& member) { return member.name.first == Projection::gate; }));
}

void LayerTensors::fill(std::span<const Member> members) {
  // More experts than tensors: one of the first must be missing, and a number in a name costs no memory.
  const int most = static_cast<int>(members.size()) + 1;
  for (const auto& [entry, name] : members) {
    experts_ = std::max(experts_, std::min(name.expert + 1, most));
    parts_ = std::max(parts_, std::min(name.part + 1, most));
  }
  const auto cells = static_cast<std::size_t>(experts_) * static_cast<std::size_t>(parts_);
  KT_CHECK(parts_ == 1 || cells <= members.size(),
           "{}: layer {} has {} experts in {} parts but {} tensors; some are missing",
           quote(checkpoint_->path().native()), layer_, experts_, parts_, members.size());
  grid_.resize(cells * kt::projections.size() * kRoleCount);
  for (const auto& [entry, name] : members) {
    nbytes_ += entry->tensor.nbytes;
    const Role role = name.tail->role;
    if (role == Role::unused || name.expert >= experts_) continue;
    auto& like = likes_[static_cast<std::size_t>(role)];
    if (!like) like = name;
    for (const Projection p : projections()) {
      if (p < name.first || p > name.last) continue;
      const Entry*& cell = grid_[place(name.expert, p, role, name.part)];
      if (cell != nullptr) fail(*entry, "says the same as {}", quote(cell->name));
      cell = entry;
    }
  }
}

void LayerTensors::check_complete() const {
  for (int expert = 0; expert < experts_; ++expert) {
    for (const Projection p : projections()) {
      for (int part = 0; part < parts_; ++part) {
        for (std::size_t role = 0; role < kRoleCount; ++role) {
          if (!likes_[role] || grid_[place(expert, p, static_cast<Role>(role), part)] != nullptr) continue;
          throw ValueError(message("{} is missing", where(tensor_name(*likes_[role], p, expert, part))));
        }
      }
    }
  }
}

void LayerTensors::check_alike() const {
  for (std::size_t at = 0; at < grid_.size(); ++at) {
    if (grid_[at] == nullptr) continue;
    const Role role = static_cast<Role>(at % kRoleCount);
    const Projection p =
        kt::projections[at / kRoleCount / static_cast<std::size_t>(parts_) % kt::projections.size()];
    const StoredTensor &tensor = grid_[at]->tensor, &wanted = first(p, role).tensor;
    const auto* type = first(role).tensor.type;
    if (tensor.type != type)
      fail(*grid_[at], "is {}, the layer's first is {}", tensor.type->name, type->name);
    if (tensor.shape != wanted.shape)
      fail(*grid_[at], "has shape {}, wanted {}", shape_text(tensor.shape), shape_text(wanted.shape));
  }
}

void LayerTensors::want_role(Role role, std::string_view called) const {
  if (!has(role)) fail(first(Role::weight), "has no {} beside it", called);
}

void LayerTensors::want_shape(Projection p, Role role, const std::vector<index_t>& wanted) const {
  const Entry& entry = first(p, role);
  if (entry.tensor.shape != wanted)
    fail(entry, "has shape {}, wanted {}", shape_text(entry.tensor.shape), shape_text(wanted));
}

}  // namespace kt
