// The experts of one layer as a checkpoint stores them, turned into the formats of base/weight.h as they are
// read. Immutable and thread-safe. Refuses scales that are NaN, infinite or 0, and columns out of order.
#pragma once

#include <array>
#include <cstddef>
#include <memory>
#include <span>
#include <string_view>

#include "base/arena.h"
#include "base/projection.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"
#include "weights/layer_tensors.h"

namespace kt {

struct LayerInfo {
  int num_experts = 0;
  index_t hidden_size = 0, intermediate_size = 0;
  std::array<WeightType, projections.size()> types;  // how each projection is kept in memory
  std::string_view stored_type;                      // of the weights, as the file names it: "BF16"
  std::string_view layout;                           // "per-expert", "fused", "gptq", ...
  bool biases = false;
  std::size_t nbytes = 0;  // of all tensors of the experts, as stored
  bool mappable = false;   // the file's layout is the one in memory

  index_t rows(Projection p) const { return p == Projection::down ? hidden_size : intermediate_size; }
  index_t cols(Projection p) const { return p == Projection::down ? intermediate_size : hidden_size; }
  // A matrix without memory: what `read` fills wants codes_bytes(), scales_bytes() and zeros_bytes().
  MutableWeight matrix(Projection p) const {
    MutableWeight empty;
    empty.type = types[index_of(p)], empty.rows = rows(p), empty.cols = cols(p);
    return empty;
  }
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
    index_t first = 0, step = 1;  // in rows of the tensor: where this matrix begins, and from row to row
    index_t per_expert = 0;       // rows of an expert in a fused tensor; 0: each has its own tensor
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

// Finds out how the layer is stored. Throws ValueError for what does not fit together.
std::unique_ptr<const LayerSource> open_source(LayerTensors tensors);

// fp32, bf16 and fp16 elements to bf16: of one row, and of a matrix, its rows side by side.
void round_rows(const DecodeKernels& decode, const MatView& from, bf16_t* to);
void round_row(const DecodeKernels& decode, DType type, index_t n, const std::byte* src, bf16_t* dst);

}  // namespace kt
