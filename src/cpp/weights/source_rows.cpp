#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "kernels/registry.h"
#include "weights/convert.h"
#include "weights/json.h"
#include "weights/layer_source.h"

namespace kt {
namespace {

bool is_rounded(const StoredType& type) { return type.dtype == DType::f16 || type.dtype == DType::f32; }

class RowsSource final : public LayerSource {
 public:
  RowsSource(LayerTensors tensors, LayerInfo info, bool interleaved)
      : LayerSource(std::move(tensors), info, interleaved) {
    if (is_mappable()) set_mappable();
  }

 private:
  const Entry& weight(int expert, Projection p) const { return tensors().at(expert, p, Role::weight); }
  const Entry& scale(int expert, Projection p) const { return tensors().at(expert, p, Role::scale); }
  bool scales_are_f16() const {
    return tensors().has(Role::scale) && tensors().first(Role::scale).tensor.type->dtype == DType::f16;
  }
  template <class Byte>
  static index_t scale_row_bytes(const WeightAt<Byte>& m) {
    return ceil_div(m.cols, m.group()) * size_of(m.type.scale);
  }
  template <class Byte>
  Plane scale_plane(Projection p, const WeightAt<Byte>& m) const {
    return plane(p, ceil_div(m.rows, m.type.scale_rows));
  }

  void read_matrix(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                   const DecodeKernels& decode) const override {
    check_shape(expert, p, scratch);
    check_order(expert, p, scratch);
    read_codes(expert, p, into, scratch, decode);
    if (into.type.scale != ScaleType::none) read_scales(expert, p, into, scratch);
    if (into.global_scale_bytes() > 0) {
      const Entry& entry = tensors().at(expert, p, Role::global_scale);
      tensors().checkpoint().read(entry, 0, {into.global_scale, to_size(into.global_scale_bytes())});
      check_global_scale(entry, expert, into.global_scale);
    }
    if (into.type.zero_points) {
      const index_t groups = ceil_div(into.cols, into.group());
      const auto words = tensors().read<std::uint32_t>(tensors().at(expert, p, Role::zeros), scratch);
      unpack_zeros(words.data(), groups, 1, into.rows, groups, kInOrder, into.zeros);
    }
  }

  void read_codes(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                  const DecodeKernels& decode) const {
    const Entry& entry = weight(expert, p);
    const Plane rows = plane(p, into.rows);
    if (!is_rounded(*entry.tensor.type)) {
      return read_rows(entry, expert, rows, into.code_bytes(into.cols), 0, into.rows, into.codes, scratch);
    }
    const index_t row_bytes = into.cols * entry.tensor.type->bits / 8;
    const index_t chunk = std::clamp(kChunkBytes / row_bytes, index_t{1}, into.rows);
    auto* stored = scratch.take<std::byte>(chunk * row_bytes);
    auto* to = reinterpret_cast<bf16_t*>(into.codes);
    for (index_t row = 0; row < into.rows; row += chunk) {
      const index_t n = std::min(chunk, into.rows - row);
      read_rows(entry, expert, rows, row_bytes, row, n, stored, scratch);
      round_row(decode, *entry.tensor.type->dtype, n * into.cols, stored, to + row * into.cols);
    }
  }

  void read_scales(int expert, Projection p, const MutableWeight& into, Arena& scratch) const {
    const Entry& entry = scale(expert, p);
    const Plane rows = scale_plane(p, into);
    if (scales_are_f16()) {
      const index_t count = into.scale_count();
      auto* halves = scratch.take<std::uint16_t>(count);
      read_rows(entry, expert, rows, count / rows.rows * 2, 0, rows.rows,
                reinterpret_cast<std::byte*>(halves), scratch);
      std::transform(halves, halves + count, reinterpret_cast<float*>(into.scales), scalar::half_to_float);
    } else {
      read_rows(entry, expert, rows, scale_row_bytes(into), 0, rows.rows, into.scales, scratch);
    }
    check_scales(entry, expert, frozen(into));
  }

  void check_global_scale(const Entry& entry, int expert, const std::byte* scale) const {
    float found;
    std::memcpy(&found, scale, sizeof found);
    if (!(found > 0) || !std::isfinite(found))
      tensors().fail(entry, "of expert {} is {}, wanted a positive and finite number", expert, found);
  }

  // compressed-tensors writes the matrix's shape beside its words.
  void check_shape(int expert, Projection p, Arena& scratch) const {
    if (!tensors().has(Role::shape)) return;
    const Entry& entry = tensors().at(expert, p, Role::shape);
    index_t found[2];
    if (entry.tensor.type->dtype == DType::i64) {
      std::ranges::copy(tensors().read<std::int64_t>(entry, scratch), found);
    } else {
      std::ranges::copy(tensors().read<std::int32_t>(entry, scratch), found);
    }
    if (found[0] != info().rows(p) || found[1] != info().cols(p))
      tensors().fail(entry, "of expert {} says {}, but the matrix is [{}, {}]", expert, shape_text(found),
                     info().rows(p), info().cols(p));
  }

  bool is_mappable() const {
    const auto aligned = [](const Entry& entry, index_t size) {
      return entry.tensor.offset % static_cast<std::uint64_t>(size) == 0;
    };
    if (interleaved() || scales_are_f16() || is_rounded(*tensors().first(Role::weight).tensor.type))
      return false;
    for (int expert = 0; expert < (tensors().fused() ? 1 : info().num_experts); ++expert) {
      for (const Projection p : tensors().projections()) {
        const auto m = info().matrix(p);
        if (m.type.zero_points) return false;
        if (m.type.format == Format::bf16 && !aligned(weight(expert, p), size_of(DType::bf16))) return false;
        if (m.type.scale != ScaleType::none && !aligned(scale(expert, p), size_of(m.type.scale)))
          return false;
      }
    }
    return true;
  }

  Weight map_matrix(int expert, Projection p) const override {
    Arena scratch;
    check_shape(expert, p, scratch);
    check_order(expert, p, scratch);
    const auto place = [&](const Entry& entry, const Plane& rows, index_t row_bytes) {
      return tensors().checkpoint().map(entry).data() + (expert * rows.per_expert + rows.first) * row_bytes;
    };
    const auto m = info().matrix(p);
    Weight mapped;
    mapped.type = m.type, mapped.rows = m.rows, mapped.cols = m.cols;
    mapped.codes = place(weight(expert, p), plane(p, m.rows), m.code_bytes(m.cols));
    if (m.type.scale != ScaleType::none) {
      mapped.scales = place(scale(expert, p), scale_plane(p, m), scale_row_bytes(m));
      check_scales(scale(expert, p), expert, mapped);
    }
    if (m.global_scale_bytes() > 0) {
      const Entry& entry = tensors().at(expert, p, Role::global_scale);
      mapped.global_scale = tensors().checkpoint().map(entry).data();
      check_global_scale(entry, expert, mapped.global_scale);
    }
    return mapped;
  }
};

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
    const index_t col_stride = both && interleaved() ? 2 : 1;
    const index_t width = into.rows * col_stride;  // elements of a row of the tensor that are read
    const index_t size = entry.tensor.type->bits / 8;
    auto* stored = scratch.take<std::byte>(kLines * width * size);
    auto* rounded = scratch.take<bf16_t>(kLines * width);
    // Halves of gate_up_proj's rows are read as rows of their own.
    Plane rows{into.cols, 0, both && !interleaved() ? 2 : 1, 0};
    rows.per_expert = into.cols * rows.row_stride;
    rows.first = rows.row_stride == 2 && p == Projection::up ? 1 : 0;
    const bf16_t* from = rounded + (col_stride == 2 && p == Projection::up ? 1 : 0);
    for (index_t col = 0; col < into.cols; col += kLines) {
      const index_t n = std::min(kLines, into.cols - col);
      read_rows(entry, expert, rows, width * size, col, n, stored, scratch);
      round_row(decode, *entry.tensor.type->dtype, n * width, stored, rounded);
      transpose(from, width, col_stride, n, into.rows, reinterpret_cast<bf16_t*>(into.codes) + col,
                into.cols);
    }
  }
};

}  // namespace

SourcePointer rows_source(LayerTensors tensors, LayerInfo info, bool interleaved) {
  return std::make_unique<RowsSource>(std::move(tensors), info, interleaved);
}

SourcePointer open_transposed(LayerTensors tensors, LayerInfo info, bool interleaved) {
  return std::make_unique<TransposedSource>(std::move(tensors), info, interleaved);
}

}  // namespace kt
