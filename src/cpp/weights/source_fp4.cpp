// Codes of 4 bits that are floats: MXFP4 as gpt-oss has it, NVFP4 as compressed-tensors and ModelOpt have it.
#include <utility>

#include "weights/json.h"
#include "weights/layer_source.h"

namespace kt {

namespace {

constexpr index_t kMxfp4Group = 32, kMxfp4GroupBytes = 16;
constexpr index_t kNvfp4Group = 16, kCodesInByte = 2;

void check_projection(const LayerTensors& tensors, const LayerInfo& info, Projection p) {
  tensors.want_shape(p, Role::weight, {info.rows(p), info.cols(p) / kCodesInByte});
  tensors.want_shape(p, Role::scale, {info.rows(p), info.cols(p) / kNvfp4Group});
  const Entry& entry = tensors.first(p, Role::global_scale);
  const auto& shape = entry.tensor.shape;
  if (!shape.empty() && shape != std::vector<index_t>{1})
    tensors.fail(entry, "has shape {}, wanted one number: [] or [1]", shape_text(shape));
}

}  // namespace

SourcePointer open_mxfp4(LayerTensors tensors) {
  want_type(tensors, Role::weight, "U8");
  tensors.want_role(Role::scale, "_scales");
  want_type(tensors, Role::scale, "U8 F8_E8M0");
  if (!tensors.gated()) tensors.fail(tensors.first(Role::weight), "has no gate in it: not supported");
  if (!tensors.interleaved().value_or(true))
    tensors.fail(tensors.first(Role::weight),
                 "has gate before up: not supported, wanted that they alternate");
  const auto& both = shape_of(tensors, Projection::gate, Role::weight, 4);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 4);
  LayerInfo info;
  info.num_experts = experts_in(tensors, both[0]);
  info.hidden = down[1], info.intermediate = both[1] / 2;
  info.layout = "mxfp4";
  const index_t hidden = info.hidden, intermediate = info.intermediate;
  if (both[1] % 2 != 0 || hidden % kMxfp4Group != 0 || intermediate % kMxfp4Group != 0)
    tensors.fail(tensors.first(Role::weight),
                 "has shape {} and that of down {}, wanted [E, 2I, H / 32, 16] and [E, H, I / 32, 16]",
                 shape_text(both), shape_text(down));
  const index_t experts = info.num_experts;
  tensors.want_shape(Projection::gate, Role::weight,
                     {experts, both[1], hidden / kMxfp4Group, kMxfp4GroupBytes});
  tensors.want_shape(Projection::gate, Role::scale, {experts, both[1], hidden / kMxfp4Group});
  tensors.want_shape(Projection::down, Role::weight,
                     {experts, hidden, intermediate / kMxfp4Group, kMxfp4GroupBytes});
  tensors.want_shape(Projection::down, Role::scale, {experts, hidden, intermediate / kMxfp4Group});
  info.types.fill({Format::mxfp4, ScaleType::e8m0, 1, kMxfp4Group});
  return rows_source(std::move(tensors), info, true);  // gpt-oss lets gate and up alternate
}

SourcePointer open_nvfp4(LayerTensors tensors) {
  const bool packed = tensors.encoding() == Encoding::packed;
  want_type(tensors, Role::weight, "U8");
  tensors.want_role(Role::scale, "weight_scale");
  want_type(tensors, Role::scale, "F8_E4M3");
  want_type(tensors, Role::global_scale, "F32");
  for (const Role role : {Role::zeros, Role::shape, Role::order})
    if (tensors.has(role)) tensors.fail(tensors.first(role), "stands beside NVFP4: not supported");

  const auto& gate = shape_of(tensors, tensors.projections().front(), Role::weight, 2);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 2);
  LayerInfo info;
  info.num_experts = tensors.experts();
  info.intermediate = gate[0], info.hidden = down[0];
  info.layout = packed ? "nvfp4, compressed-tensors" : "nvfp4, modelopt";
  if (info.hidden % kNvfp4Group != 0 || info.intermediate % kNvfp4Group != 0)
    tensors.fail(
        tensors.first(Role::weight),
        "has shape {} and that of down {}, wanted [I, H / 2] and [H, I / 2], H and I multiples of 16",
        shape_text(gate), shape_text(down));
  for (const Projection p : tensors.projections()) check_projection(tensors, info, p);
  info.types.fill({Format::nvfp4, ScaleType::e4m3, 1, kNvfp4Group, false,
                   packed ? GlobalScale::divides : GlobalScale::multiplies});
  return rows_source(std::move(tensors), info, false);
}

}  // namespace kt
