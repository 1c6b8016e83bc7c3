#include <utility>

#include "weights/sources.h"

namespace kt {
namespace {

void check_groups(const LayerTensors& tensors, LayerInfo& info, Projection p, ScaleType scale) {
  const auto& shape = shape_of(tensors, p, Role::scale, 2);
  const Entry& entry = tensors.first(p, Role::scale);
  const index_t rows = info.rows(p), cols = info.cols(p), groups = shape[1];
  info.types[index_of(p)] = {Format::int4, scale, 1, group_of(tensors, entry, cols, groups),
                             tensors.has(Role::zeros)};
  tensors.want_shape(p, Role::scale, {rows, groups});
  if (tensors.has(Role::zeros)) tensors.want_shape(p, Role::zeros, {ceil_div(rows, kCodesInWord), groups});
  if (tensors.has(Role::shape)) tensors.want_shape(p, Role::shape, {2});
  if (tensors.has(Role::order)) tensors.want_shape(p, Role::order, {cols});
}

}  // namespace

SourcePointer open_packed(LayerTensors tensors) {
  want_type(tensors, Role::weight, "I32");
  tensors.want_role(Role::scale, "weight_scale");
  want_type(tensors, Role::scale, "BF16 F16 F32");
  if (tensors.has(Role::zeros)) want_type(tensors, Role::zeros, "I32");
  if (tensors.has(Role::shape)) want_type(tensors, Role::shape, "I64 I32");
  if (tensors.has(Role::order)) want_type(tensors, Role::order, "I32");

  const auto& gate = shape_of(tensors, Projection::gate, Role::weight, 2);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 2);
  LayerInfo info;
  info.num_experts = tensors.experts();
  info.intermediate_size = gate[0], info.hidden_size = down[0];
  info.layout = "compressed-tensors";
  if (gate[1] * kCodesInWord != info.hidden_size || down[1] * kCodesInWord != info.intermediate_size)
    tensors.fail(
        tensors.first(Projection::gate, Role::weight),
        "has shape {} and that of down {}, wanted [I, H / 8] and [H, I / 8], 8 codes of 4 bits a word",
        shape_text(gate), shape_text(down));
  tensors.want_shape(Projection::up, Role::weight, gate);

  const bool short_scales = tensors.first(Projection::gate, Role::scale).tensor.type->dtype == DType::bf16;
  for (const Projection p : projections)
    check_groups(tensors, info, p, short_scales ? ScaleType::bf16 : ScaleType::f32);
  return rows_source(std::move(tensors), info, false);
}

}  // namespace kt
