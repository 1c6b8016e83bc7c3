// The experts of one layer as a checkpoint stores them, turned into the formats of base/weight.h as they are
// read. Immutable and thread-safe. Refuses scales that are NaN, infinite or 0, and columns out of order.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "base/memory.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"
#include "weights/expert_tensors.h"

namespace kt {

struct LayerInfo : LayerShape {       // `types`: how each projection is kept in memory
  std::string_view stored_type = {};  // of the weights, as the file names it: "BF16"
  std::string_view layout = {};       // "per-expert", "fused", "gptq", ...
  bool biases = false;
  std::size_t nbytes = 0;  // of all tensors of the experts, as stored
  bool mappable = false;   // the file's layout is the one in memory
};

class LayerSource {
 public:
  virtual ~LayerSource() = default;
  LayerSource(const LayerSource&) = delete;
  LayerSource& operator=(const LayerSource&) = delete;

  const LayerInfo& info() const { return info_; }

  // One matrix into the memory of `into`, which is info().matrix(p) with places. `scratch` holds what is read
  // on the way, at most about an expert. Throws ValueError, IoError.
  void read(int expert, Projection p, const MutableWeight& into, Arena& scratch,
            const DecodeKernels& decode) const;
  // Where the codes of a matrix are stored.
  struct Stretch {
    const Entry* entry;
    std::uint64_t begin, bytes;  // of the tensor
  };
  Stretch stretch(int expert, Projection p) const;
  // Has it read from the disk meanwhile.
  void read_ahead(const Stretch& stretch) const {
    tensors_.checkpoint().read_ahead(*stretch.entry, stretch.begin, stretch.bytes);
  }
  // The matrix where it lies in the mapped file, valid as long as the checkpoint is. ValueError if the layout
  // is not the one in memory, and for what `read` refuses.
  Weight map(int expert, Projection p) const;
  // [rows] of the matrix. Only if info().biases.
  void read_bias(int expert, Projection p, bf16_t* into, Arena& scratch, const DecodeKernels& decode) const;

 protected:
  // Read at a time where more is done with what was read, which so stays in the L2 cache.
  static constexpr index_t kChunkBytes = 256 * 1024;

  // Rows of a stored tensor at equal distances.
  struct Plane {
    index_t rows = 0;
    index_t first = 0,
            row_stride = 1;  // in rows of the tensor: where this matrix begins, and from row to row
    index_t per_expert = 0;  // rows of an expert in a fused tensor; 0: each has its own tensor
  };

  // `interleaved`: gate and up alternate in fused tensors.
  LayerSource(LayerTensors tensors, LayerInfo info, bool interleaved);

  virtual void read_matrix(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                           const DecodeKernels& decode) const = 0;
  virtual Weight map_matrix(int expert, Projection p) const;

  const LayerTensors& tensors() const { return tensors_; }
  bool interleaved() const { return interleaved_; }
  void set_mappable() { info_.mappable = true; }
  // Where the `rows` rows of a matrix lie in a tensor that holds one row an output.
  Plane plane(Projection p, index_t rows) const;
  // Rows [begin, begin + count) of the plane, side by side.
  void read_rows(const Entry& entry, int expert, const Plane& plane, index_t row_bytes, index_t begin,
                 index_t count, std::byte* to, Arena& scratch) const;
  // BF16, F16 or F32 to fp32.
  std::span<const float> read_floats(const Entry& entry, Arena& scratch) const;
  void check_scales(const Entry& entry, int expert, const Weight& matrix) const;
  // Columns of a quantised matrix in another order than their groups' are refused.
  void check_order(int expert, Projection p, Arena& scratch) const;

 private:
  void check_biases() const;
  void check_expert(int expert) const;

  LayerTensors tensors_;
  LayerInfo info_;
  bool interleaved_;
};

using SourcePointer = std::unique_ptr<const LayerSource>;

// Finds out how the layer is stored. Throws ValueError, naming the tensor, for what does not fit together.
SourcePointer open_source(LayerTensors tensors);

// One function for every way to store experts: each checks the tensors of a layer and says how to read them.

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

// Rows of codes and rows of scales, each a row of the tensor; gate and up may alternate in fused ones.
SourcePointer rows_source(LayerTensors tensors, LayerInfo info, bool interleaved);

// What the functions above check with.

inline constexpr index_t kCodesInWord = 8;  // int4 in words of 32 bits

// The tensor's shape, if it has so many dimensions and none is 0.
const std::vector<index_t>& shape_of(const LayerTensors& tensors, Projection p, Role role, std::size_t rank);
// Checks the number of experts of fused tensors.
int experts_in(const LayerTensors& tensors, index_t experts);
// `group` of the columns that share a scale, as WeightType has it: 0 for all.
index_t group_of(const LayerTensors& tensors, const Entry& scales, index_t cols, index_t groups);
// Tensors of a role are one of `types`, e.g. "BF16 F16".
void want_type(const LayerTensors& tensors, Role role, std::string_view types);

// fp32, bf16 and fp16 elements to bf16: of one row, and of a matrix, its rows side by side.
void round_rows(const DecodeKernels& decode, const MatView& from, bf16_t* to);
void round_row(const DecodeKernels& decode, DType type, index_t n, const std::byte* src, bf16_t* dst);

}  // namespace kt
