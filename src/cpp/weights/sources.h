// One function for every way to store experts: each checks the tensors of a layer and says how to read them.
// All throw ValueError, naming the tensor.
#pragma once

#include <memory>

#include "weights/layer_source.h"

namespace kt {

using SourcePointer = std::unique_ptr<const LayerSource>;

inline constexpr index_t kCodesInWord = 8;  // int4 in words of 32 bits

// .weight of each expert, or gate_up_proj and down_proj of all: BF16, F16, F32; F8_E4M3 and I8 with scales.
SourcePointer open_plain(LayerTensors tensors);
// Floats whose rows run along the outputs.
SourcePointer open_transposed(LayerTensors tensors, LayerInfo info, bool interleaved);
// compressed-tensors: weight_packed, int4.
SourcePointer open_packed(LayerTensors tensors);
// GPTQ and AWQ: qweight, int4 in words.
SourcePointer open_gptq(LayerTensors tensors);
// gpt-oss: gate_up_proj_blocks and the like.
SourcePointer open_mxfp4(LayerTensors tensors);
// NVFP4: compressed-tensors' weight_packed, weight_scale and weight_global_scale, which divides the scales;
// or ModelOpt's weight, weight_scale and weight_scale_2, which multiplies them.
SourcePointer open_nvfp4(LayerTensors tensors);
// Files that kt-kernel writes: int8 or int4 in tiles.
SourcePointer open_kt(LayerTensors tensors);

// Which of them reads a layer. The weights' own tail has an encoding, so that it is not `any`.
inline auto* opener_of(const LayerTensors& tensors) {
  if (tensors.has(Role::global_scale)) return &open_nvfp4;
  constexpr decltype(&open_plain) kByEncoding[] = {nullptr,   open_plain, open_packed,
                                                   open_gptq, open_mxfp4, open_kt};
  return kByEncoding[static_cast<std::size_t>(tensors.encoding())];
}

// Rows of codes and rows of scales, each a row of the tensor; gate and up may alternate in fused ones.
SourcePointer rows_source(LayerTensors tensors, LayerInfo info, bool interleaved);

// The tensor's shape, if it has so many dimensions and none is 0.
const std::vector<index_t>& shape_of(const LayerTensors& tensors, Projection p, Role role, std::size_t rank);
// Checks the number of experts of fused tensors.
int experts_in(const LayerTensors& tensors, index_t experts);
// `group` of the columns that share a scale, as WeightType has it: 0 for all.
index_t group_of(const LayerTensors& tensors, const Entry& scales, index_t cols, index_t groups);
// Tensors of a role are one of `types`, e.g. "BF16 F16".
void want_type(const LayerTensors& tensors, Role role, std::string_view types);

}  // namespace kt
