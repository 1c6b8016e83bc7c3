#include <utility>

#include "weights/json.h"
#include "weights/layer_source.h"

namespace kt {
namespace {

constexpr index_t kFp8Block = 128;  // rows and columns that share a scale, DeepSeek's

bool is_float(const StoredType& type) {
  return type.dtype == DType::bf16 || type.dtype == DType::f16 || type.dtype == DType::f32;
}

struct Sizes {
  LayerInfo info;
  bool transposed = false;
};

Sizes per_expert_sizes(const LayerTensors& tensors) {
  const auto& gate = shape_of(tensors, tensors.projections().front(), Role::weight, 2);
  const index_t intermediate = gate[0], hidden = gate[1];
  tensors.want_shape(Projection::up, Role::weight, gate);
  tensors.want_shape(Projection::down, Role::weight, {hidden, intermediate});
  return {{{tensors.experts(), hidden, intermediate}, {}, "per-expert"}};
}

// [E, 2I, H] with [E, H, I], or [E, H, 2I] with [E, I, H]. No shapes fit both: the second dimension of
// gate_up_proj is twice the last of down_proj, or the same. Without a gate it is I for 2I, and all shapes
// that fit the one fit the other: it is the former.
Sizes fused_sizes(const LayerTensors& tensors) {
  const auto& both = shape_of(tensors, tensors.projections().front(), Role::weight, 3);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 3);
  const index_t matrices = tensors.matrices(Projection::up);
  const bool natural = both[1] == matrices * down[2] && both[2] == down[1];
  const bool transposed = !natural && both[1] == down[2] && both[2] == matrices * down[1];
  if (!natural && !transposed) {
    tensors.fail(
        tensors.first(Role::weight), "has shape {} and down_proj {}, wanted {}", shape_text(both),
        shape_text(down),
        matrices == 2 ? "[E, 2I, H] and [E, H, I], or [E, H, 2I] and [E, I, H]" : "[E, I, H] and [E, H, I]");
  }
  tensors.want_shape(Projection::down, Role::weight, {both[0], down[1], down[2]});
  const int experts = experts_in(tensors, both[0]);
  if (transposed) return {{{experts, down[2], down[1]}, {}, "fused, transposed"}, true};
  return {{{experts, down[1], down[2]}, {}, "fused"}};
}

SourcePointer open_floats(LayerTensors tensors, Sizes sizes) {
  if (tensors.has(Role::scale))
    tensors.fail(tensors.first(Role::scale), "is a scale, but the weights are {}",
                 tensors.first(Role::weight).tensor.type->name);
  sizes.info.types.fill({});
  // Of all that store [E, H, 2I], gpt-oss has biases, and lets gate and up alternate.
  const bool interleaved = tensors.interleaved().value_or(sizes.transposed && tensors.has(Role::bias));
  if (!sizes.transposed) {
    if (interleaved) sizes.info.layout = "fused, interleaved";
    return rows_source(std::move(tensors), sizes.info, interleaved);
  }
  if (interleaved) sizes.info.layout = "fused, transposed, interleaved";
  return open_transposed(std::move(tensors), sizes.info, interleaved);
}

ScaleType kept_scale(const LayerTensors& tensors) {
  want_type(tensors, Role::scale, "F32 BF16 F16 F8_E8M0");
  const auto* type = tensors.first(Role::scale).tensor.type;
  if (type->dtype == DType::bf16) return ScaleType::bf16;
  return type->dtype ? ScaleType::f32 : ScaleType::e8m0;
}

// A tensor of scales as [matrices * height, width].
struct ScaleShape {
  index_t matrices;  // whose scales stand one below the other: gate and up where fused
  std::vector<index_t> rows_and_cols;

  bool is(index_t height, index_t width) const {
    return rows_and_cols == std::vector{matrices * height, width};
  }
};

ScaleShape scale_shape(const LayerTensors& tensors, int experts, Projection p) {
  const Entry& entry = tensors.first(p, Role::scale);
  const auto& shape = entry.tensor.shape;
  if (tensors.fused()) {
    if (shape.size() != 3 || shape[0] != experts)
      tensors.fail(entry, "has shape {}, wanted [{}, ., .]", shape_text(shape), experts);
    return {tensors.matrices(p), {shape[1], shape[2]}};
  }
  if (shape.empty()) return {1, {1, 1}};
  if (shape.size() == 1) return {1, {shape[0], 1}};
  return {1, shape};
}

[[noreturn]] void fail_scale_shape(const LayerTensors& tensors, Projection p, index_t matrices, index_t rows,
                                   index_t cols, bool cut) {
  const Entry& entry = tensors.first(p, Role::scale);
  const auto blocks = cut ? std::string("the matrices' rows to be a multiple of 128, ")
                          : message("[{}, {}] for blocks of 128 x 128, ",
                                    matrices * ceil_div(rows, kFp8Block), ceil_div(cols, kFp8Block));
  tensors.fail(entry, "has shape {} for {} matrices of [{}, {}], wanted {}one a row or one a matrix",
               shape_text(entry.tensor.shape), matrices, rows, cols, blocks);
}

// What the shape of the scales says: one a block of 128 x 128, one a row, or one for all.
WeightType coded_type(const LayerTensors& tensors, const LayerInfo& info, Projection p, Format format) {
  const index_t rows = info.rows(p), cols = info.cols(p);
  WeightType type{format, kept_scale(tensors)};
  const ScaleShape shape = scale_shape(tensors, info.num_experts, p);
  const bool cut = shape.matrices > 1 && rows % kFp8Block != 0;  // a block may hold rows of gate and of up
  if (shape.is(ceil_div(rows, kFp8Block), ceil_div(cols, kFp8Block)) && !cut) {
    type.scale_rows = type.scale_cols = kFp8Block;
  } else if (shape.is(rows, 1)) {
    type.scale_rows = 1;
  } else if (shape.is(1, 1)) {
    type.scale_rows = rows;
  } else {
    fail_scale_shape(tensors, p, shape.matrices, rows, cols, cut);
  }
  return type;
}

SourcePointer open_coded(LayerTensors tensors, Sizes sizes, Format format) {
  const Entry& entry = tensors.first(Role::weight);
  tensors.want_role(Role::scale, "weight_scale_inv or weight_scale");
  if (tensors.interleaved().value_or(false))
    tensors.fail(entry, "is {}, and gate and up alternate in it: not supported, wanted gate first",
                 entry.tensor.type->name);
  if (sizes.transposed)
    tensors.fail(entry, "is {} of shape {}, rows along the outputs: not supported, wanted [E, 2I, H]",
                 entry.tensor.type->name, shape_text(entry.tensor.shape));
  for (const Projection p : tensors.projections())
    sizes.info.types[index_of(p)] = coded_type(tensors, sizes.info, p, format);
  return rows_source(std::move(tensors), sizes.info, false);
}

}  // namespace

SourcePointer open_plain(LayerTensors tensors) {
  want_type(tensors, Role::weight, "BF16 F16 F32 F8_E4M3 I8");
  const Sizes sizes = tensors.fused() ? fused_sizes(tensors) : per_expert_sizes(tensors);
  if (tensors.fused() && tensors.has(Role::bias) && !sizes.transposed && !tensors.interleaved())
    tensors.fail(tensors.first(Role::bias),
                 "stands beside gate_up_proj [E, 2I, H]: whether gate and up alternate cannot be known");
  const StoredType& type = *tensors.first(Role::weight).tensor.type;
  if (is_float(type)) return open_floats(std::move(tensors), sizes);
  return open_coded(std::move(tensors), sizes, type.name == "I8" ? Format::int8 : Format::fp8);
}

}  // namespace kt
