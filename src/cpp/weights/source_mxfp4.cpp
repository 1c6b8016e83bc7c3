#include <utility>

#include "weights/sources.h"

namespace kt {

namespace {

constexpr index_t kGroup = 32, kGroupBytes = 16;

}  // namespace

SourcePointer open_mxfp4(LayerTensors tensors) {
  want_type(tensors, Role::weight, "U8");
  tensors.want_role(Role::scale, "_scales");
  want_type(tensors, Role::scale, "U8 F8_E8M0");
  if (!tensors.interleaved().value_or(true))
    tensors.fail(tensors.first(Projection::gate, Role::weight),
                 "has gate before up: not supported, wanted that they alternate");
  const auto& both = shape_of(tensors, Projection::gate, Role::weight, 4);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 4);
  LayerInfo info;
  info.num_experts = experts_in(tensors, both[0]);
  info.hidden_size = down[1], info.intermediate_size = both[1] / 2;
  info.layout = "mxfp4";
  const index_t hidden = info.hidden_size, intermediate = info.intermediate_size;
  if (both[1] % 2 != 0 || hidden % kGroup != 0 || intermediate % kGroup != 0)
    tensors.fail(tensors.first(Projection::gate, Role::weight),
                 "has shape {} and that of down {}, wanted [E, 2I, H / 32, 16] and [E, H, I / 32, 16]",
                 shape_text(both), shape_text(down));
  const index_t experts = info.num_experts;
  tensors.want_shape(Projection::gate, Role::weight, {experts, both[1], hidden / kGroup, kGroupBytes});
  tensors.want_shape(Projection::gate, Role::scale, {experts, both[1], hidden / kGroup});
  tensors.want_shape(Projection::down, Role::weight, {experts, hidden, intermediate / kGroup, kGroupBytes});
  tensors.want_shape(Projection::down, Role::scale, {experts, hidden, intermediate / kGroup});
  info.types.fill({Format::mxfp4, ScaleType::e8m0, 1, kGroup});
  return rows_source(std::move(tensors), info, true);  // gpt-oss lets gate and up alternate
}

}  // namespace kt
