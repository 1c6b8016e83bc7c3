#include <algorithm>
#include <utility>

#include "weights/convert.h"
#include "weights/sources.h"

namespace kt {
namespace {

// gate_up_proj [E, H, 2I], down_proj [E, I, H]: row k of the tensor holds column k of the matrices.
class TransposedSource final : public LayerSource {
 public:
  TransposedSource(LayerTensors tensors, LayerInfo info, bool interleaved)
      : LayerSource(std::move(tensors), info, interleaved) {}

 private:
  void read_matrix(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                   const DecodeKernels& decode) const override {
    constexpr index_t kLines = 64;  // columns of the matrix at a time: 128 bytes of each of its rows
    const Entry& entry = tensors().at(expert, p, Role::weight);
    const bool both = p != Projection::down;
    const index_t step = both && interleaved() ? 2 : 1;
    const index_t width = into.rows * step;  // elements of a row of the tensor that are read
    const index_t size = entry.tensor.type->bits / 8;
    auto* stored = scratch.take<std::byte>(kLines * width * size);
    auto* rounded = scratch.take<bf16_t>(kLines * width);
    // Halves of gate_up_proj's rows are read as rows of their own.
    Plane rows{into.cols, 0, both && !interleaved() ? 2 : 1, 0};
    rows.per_expert = into.cols * rows.step;
    rows.first = rows.step == 2 && p == Projection::up ? 1 : 0;
    const bf16_t* from = rounded + (step == 2 && p == Projection::up ? 1 : 0);
    for (index_t col = 0; col < into.cols; col += kLines) {
      const index_t n = std::min(kLines, into.cols - col);
      read_rows(entry, expert, rows, width * size, col, n, stored, scratch);
      round_row(decode, *entry.tensor.type->dtype, n * width, stored, rounded);
      transpose(from, width, step, n, into.rows, reinterpret_cast<bf16_t*>(into.codes) + col, into.cols);
    }
  }
};

}  // namespace

SourcePointer open_transposed(LayerTensors tensors, LayerInfo info, bool interleaved) {
  return std::make_unique<TransposedSource>(std::move(tensors), info, interleaved);
}

}  // namespace kt
