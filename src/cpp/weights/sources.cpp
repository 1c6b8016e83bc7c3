#include "weights/sources.h"

#include <algorithm>

namespace kt {

const std::vector<index_t>& shape_of(const LayerTensors& tensors, Projection p, Role role, std::size_t rank) {
  const Entry& entry = tensors.first(p, role);
  const auto& shape = entry.tensor.shape;
  if (shape.size() != rank)
    tensors.fail(entry, "has shape {}, wanted {} dimensions", shape_text(shape), rank);
  if (std::ranges::find(shape, 0) != shape.end())
    tensors.fail(entry, "has shape {}, wanted no 0", shape_text(shape));
  return shape;
}

int experts_in(const LayerTensors& tensors, index_t experts) {
  constexpr index_t kMostExperts = 1'000'000;  // far above any model, so that an int counts them
  if (experts > kMostExperts)
    tensors.fail(tensors.first(Projection::gate, Role::weight), "has {} experts, wanted at most {}", experts,
                 kMostExperts);
  return static_cast<int>(experts);
}

index_t group_of(const LayerTensors& tensors, const Entry& scales, index_t cols, index_t groups) {
  if (groups == 1) return 0;
  if (groups < 1 || cols % groups != 0 || cols / groups % 32 != 0)
    tensors.fail(scales, "has {} scales for {} columns, wanted one, or one for each so many multiples of 32",
                 groups, cols);
  return cols / groups;
}

void want_type(const LayerTensors& tensors, Role role, std::string_view types) {
  const Entry& entry = tensors.first(Projection::gate, role);
  for (std::size_t at = 0; at < types.size();) {
    const auto end = std::min(types.find(' ', at), types.size());
    if (types.substr(at, end - at) == entry.tensor.type->name) return;
    at = end + 1;
  }
  tensors.fail(entry, "is {}, wanted one of {}", entry.tensor.type->name, types);
}

}  // namespace kt
