#include <utility>

#include "weights/sources.h"

namespace kt {

namespace {

constexpr index_t kGroup = 16, kCodesInByte = 2;

void check_projection(const LayerTensors& tensors, const LayerInfo& info, Projection p) {
  tensors.want_shape(p, Role::weight, {info.rows(p), info.cols(p) / kCodesInByte});
  tensors.want_shape(p, Role::scale, {info.rows(p), info.cols(p) / kGroup});
  const Entry& entry = tensors.first(p, Role::global_scale);
  const auto& shape = entry.tensor.shape;
  if (!shape.empty() && shape != std::vector<index_t>{1})
    tensors.fail(entry, "has shape {}, wanted one number: [] or [1]", shape_text(shape));
}

}  // namespace

SourcePointer open_nvfp4(LayerTensors tensors) {
  const bool packed = tensors.encoding() == Encoding::packed;
  want_type(tensors, Role::weight, "U8");
  tensors.want_role(Role::scale, "weight_scale");
  want_type(tensors, Role::scale, "F8_E4M3");
  want_type(tensors, Role::global_scale, "F32");
  for (const Role role : {Role::zeros, Role::shape, Role::order})
    if (tensors.has(role))
      tensors.fail(tensors.first(Projection::gate, role), "stands beside NVFP4: not supported");

  const auto& gate = shape_of(tensors, Projection::gate, Role::weight, 2);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 2);
  LayerInfo info;
  info.num_experts = tensors.experts();
  info.intermediate_size = gate[0], info.hidden_size = down[0];
  info.layout = packed ? "nvfp4, compressed-tensors" : "nvfp4, modelopt";
  if (info.hidden_size % kGroup != 0 || info.intermediate_size % kGroup != 0)
    tensors.fail(
        tensors.first(Projection::gate, Role::weight),
        "has shape {} and that of down {}, wanted [I, H / 2] and [H, I / 2], H and I multiples of 16",
        shape_text(gate), shape_text(down));
  for (const Projection p : projections) check_projection(tensors, info, p);
  info.types.fill({Format::nvfp4, ScaleType::e4m3, 1, kGroup, false,
                   packed ? GlobalScale::divides : GlobalScale::multiplies});
  return rows_source(std::move(tensors), info, false);
}

}  // namespace kt
