#include <utility>

#include "weights/convert.h"
#include "weights/json.h"
#include "weights/layer_source.h"

namespace kt {
namespace {

// A matrix is cut into parts, gate and up between rows, down between columns. A part is tiles of codes and a
// scale for each of its rows; int4 codes stand for 16 times themselves.
class TilesSource final : public LayerSource {
 public:
  TilesSource(LayerTensors tensors, LayerInfo info) : LayerSource(std::move(tensors), info, false) {}

 private:
  void read_matrix(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                   const DecodeKernels&) const override {
    const bool int4 = into.type.format == Format::int4, down = p == Projection::down;
    const index_t parts = tensors().parts(), stride = into.code_bytes(into.cols);
    const index_t rows = down ? into.rows : into.rows / parts, cols = down ? into.cols / parts : into.cols;
    auto* scales = reinterpret_cast<float*>(into.scales);
    for (int part = 0; part < parts; ++part) {
      const Arena::Frame frame(scratch);
      const auto tiles = tensors().read<std::byte>(tensors().at(expert, p, Role::weight, part), scratch);
      const Entry& scale = tensors().at(expert, p, Role::scale, part);
      const auto part_scales = tensors().read<float>(scale, scratch);
      const WeightType by_row{into.type.format, ScaleType::f32};
      check_scales(scale, expert,
                   {by_row, rows, cols, nullptr, reinterpret_cast<const std::byte*>(part_scales.data())});
      std::byte* codes = into.codes + part * (down ? into.code_bytes(cols) : rows * stride);
      (int4 ? kt_int4_codes : kt_int8_codes)(tiles.data(), rows, cols, codes, stride);
      float* to = scales + part * (down ? 1 : rows);
      const index_t every = down ? parts : 1;
      for (index_t i = 0; i < rows; ++i) to[i * every] = part_scales[to_size(i)] * (int4 ? 16.0f : 1.0f);
    }
  }
};

struct Part {
  index_t rows, bytes;
};

Part part_of(const LayerTensors& tensors, Projection p) {
  const auto& bytes = shape_of(tensors, p, Role::weight, 1);
  const auto& rows = shape_of(tensors, p, Role::scale, 1);
  return {rows[0], bytes[0]};
}

// Tiles are 32 rows by 64 bytes, of one column each or two.
void check_part(const LayerTensors& tensors, const LayerInfo& info, Projection p, int bits) {
  const index_t parts = tensors.parts();
  const index_t rows = info.rows(p) / (p == Projection::down ? 1 : parts);
  const index_t cols = info.cols(p) / (p == Projection::down ? parts : 1);
  const Part found = part_of(tensors, p);
  const index_t tile_cols = 64 * 8 / bits;
  if (found.rows != rows || found.bytes != rows * cols * bits / 8 || rows % 32 != 0 || cols % tile_cols != 0)
    tensors.fail(
        tensors.first(p, Role::weight),
        "has {} bytes and {} scales, wanted {} for {} rows of {} columns as int{}, the rows a multiple "
        "of 32, the columns of {}",
        found.bytes, found.rows, rows * cols * bits / 8, rows, cols, bits, tile_cols);
}

}  // namespace

SourcePointer open_kt(LayerTensors tensors) {
  want_type(tensors, Role::weight, "I8 U8");
  tensors.want_role(Role::scale, ".scale");
  want_type(tensors, Role::scale, "F32");
  const Part gate = part_of(tensors, Projection::gate), down = part_of(tensors, Projection::down);
  const index_t parts = tensors.parts();
  LayerInfo info{{tensors.experts(), down.rows, gate.rows * parts}, {}, "kt"};
  // A byte for each of the hidden columns of gate, or one for two of them.
  const int bits = gate.bytes == gate.rows * info.hidden ? 8 : 4;
  for (const Projection p : projections) {
    check_part(tensors, info, p, bits);
    const bool cut = p == Projection::down && parts > 1;
    info.types[index_of(p)] = {bits == 8 ? Format::int8 : Format::int4, ScaleType::f32, 1,
                               cut ? info.intermediate / parts : 0};
  }
  return std::make_unique<TilesSource>(std::move(tensors), info);
}

}  // namespace kt
