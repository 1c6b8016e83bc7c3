#include "weights/layer_source.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "kernels/registry.h"
#include "weights/convert.h"
#include "weights/grids.h"
#include "weights/json.h"

namespace kt {

LayerSource::LayerSource(LayerTensors tensors, LayerInfo info, bool interleaved)
    : tensors_(std::move(tensors)), info_(info), interleaved_(interleaved) {
  info_.stored_type = tensors_.first(Role::weight).tensor.type->name;
  info_.gated = tensors_.gated();
  info_.biases = tensors_.has(Role::bias);
  info_.nbytes = tensors_.nbytes();
  if (info_.biases) check_biases();
}

void LayerSource::check_biases() const {
  for (const Projection p : tensors_.projections()) {
    const Entry& entry = tensors_.first(p, Role::bias);
    const auto type = entry.tensor.type->dtype;
    if (type != DType::bf16 && type != DType::f16 && type != DType::f32)
      tensors_.fail(entry, "is {}, wanted BF16, F16 or F32", entry.tensor.type->name);
    std::vector<index_t> wanted{info_.rows(p)};
    if (tensors_.fused()) wanted = {info_.num_experts, info_.rows(p) * tensors_.matrices(p)};
    tensors_.want_shape(p, Role::bias, wanted);
  }
}

void LayerSource::check_expert(int expert) const {
  KT_CHECK(expert >= 0 && expert < info_.num_experts, "expert is {}, but layer {} has {} experts", expert,
           tensors_.layer(), info_.num_experts);
}

void LayerSource::read(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                       const DecodeKernels& decode) const {
  check_expert(expert);
  KT_CHECK(into.type == info_.types[index_of(p)] && into.rows == info_.rows(p) && into.cols == info_.cols(p),
           "the memory for {} of layer {} is of another shape or format: {} {} x {}, wanted {} {} x {}",
           name_of(p), tensors_.layer(), name_of(into.type.format), into.rows, into.cols,
           name_of(info_.types[index_of(p)].format), info_.rows(p), info_.cols(p));
  const Arena::Frame frame(scratch);
  read_matrix(expert, p, into, scratch, decode);
}

Weight LayerSource::map(int expert, Projection p) const {
  check_expert(expert);
  KT_CHECK(info_.mappable,
           "{}: layer {} cannot be used where it lies in the file: it is stored as {} {}, "
           "wanted rows of {} one after the other, each tensor aligned to its elements",
           quote(tensors_.checkpoint().path().native()), tensors_.layer(), info_.stored_type, info_.layout,
           name_of(info_.types[index_of(p)].format));
  return map_matrix(expert, p);
}

Weight LayerSource::map_matrix(int, Projection) const { return {}; }

LayerSource::Stretch LayerSource::stretch(int expert, Projection p) const {
  const Entry& entry = tensors_.at(expert, p, Role::weight);
  const auto parts = static_cast<std::uint64_t>(tensors_.fused() ? info_.num_experts : 1);
  const std::uint64_t bytes = entry.tensor.nbytes / parts;
  return {&entry, tensors_.fused() ? bytes * static_cast<std::uint64_t>(expert) : 0, bytes};
}

LayerSource::Plane LayerSource::plane(Projection p, index_t rows) const {
  if (!tensors_.fused()) return {rows};
  if (tensors_.matrices(p) == 1) return {rows, 0, 1, rows};
  const index_t part = p == Projection::up ? 1 : 0;
  if (interleaved_) return {rows, part, 2, 2 * rows};
  return {rows, part * rows, 1, 2 * rows};
}

void LayerSource::read_bias(int expert, Projection p, bf16_t* into, Arena& scratch,
                            const DecodeKernels& decode) const {
  check_expert(expert);
  KT_CHECK(info_.biases, "layer {} has no biases", tensors_.layer());
  const Arena::Frame frame(scratch);
  const Entry& entry = tensors_.at(expert, p, Role::bias);
  const index_t n = info_.rows(p), size = entry.tensor.type->bits / 8;
  auto* stored = scratch.take<std::byte>(n * size);
  read_rows(entry, expert, plane(p, n), size, 0, n, stored, scratch);
  round_row(decode, *entry.tensor.type->dtype, n, stored, into);
}

void LayerSource::read_rows(const Entry& entry, int expert, const Plane& plane, index_t row_bytes,
                            index_t begin, index_t count, std::byte* to, Arena& scratch) const {
  const auto read = [&](index_t row, std::byte* at, index_t bytes) {
    tensors_.checkpoint().read(entry, static_cast<std::uint64_t>(row * row_bytes), {at, to_size(bytes)});
  };
  const index_t first = expert * plane.per_expert + plane.first;
  if (plane.row_stride == 1) return read(first + begin, to, count * row_bytes);
  const Arena::Frame frame(scratch);
  const index_t stride = plane.row_stride * row_bytes;
  const index_t chunk = std::clamp(kChunkBytes / stride, index_t{1}, count);
  auto* chunk_data = scratch.take<std::byte>(chunk * stride);
  for (index_t done = 0; done < count; done += chunk) {
    const index_t n = std::min(chunk, count - done);
    read(first + (begin + done) * plane.row_stride, chunk_data, (n - 1) * stride + row_bytes);
    for (index_t i = 0; i < n; ++i, to += row_bytes)
      std::memcpy(to, chunk_data + i * stride, to_size(row_bytes));
  }
}

std::span<const float> LayerSource::read_floats(const Entry& entry, Arena& scratch) const {
  const auto type = entry.tensor.type->dtype;
  if (type == DType::f32) return tensors_.read<float>(entry, scratch);
  const auto halves = tensors_.read<std::uint16_t>(entry, scratch);
  auto* floats = scratch.take<float>(std::ssize(halves));
  std::ranges::transform(halves, floats, type == DType::f16 ? scalar::half_to_float : to_float);
  return {floats, halves.size()};
}

void LayerSource::check_scales(const Entry& entry, int expert, const Weight& matrix) const {
  const auto bad = grids::bad_scale(matrix.type.scale, matrix.scales, matrix.scale_count());
  if (!bad) return;
  const index_t across = ceil_div(matrix.cols, matrix.group());
  tensors_.fail(entry, "has a scale that is NaN, infinite or 0: that of block [{}, {}] of expert {}",
                *bad / across, *bad % across, expert);
}

void LayerSource::check_order(int expert, Projection p, Arena& scratch) const {
  if (!tensors_.has(Role::order)) return;
  const Entry& entry = tensors_.at(expert, p, Role::order);
  const auto groups = tensors_.read<std::int32_t>(entry, scratch);
  const index_t group = info_.matrix(p).group();
  for (index_t begin = 0, number = 0; begin < std::ssize(groups); begin += group, ++number) {
    for (index_t i = begin; i < std::min(begin + group, std::ssize(groups)); ++i) {
      const auto found = groups[to_size(i)];
      if (found != number)
        tensors_.fail(entry,
                      "puts column {} into group {}, wanted {}: columns reordered by activation "
                      "(act-order, desc_act) are not supported",
                      i, found, number);
    }
  }
}

void round_row(const DecodeKernels& decode, DType type, index_t n, const std::byte* src, bf16_t* dst) {
  switch (type) {
    case DType::f16: return decode.from_f16(to_int(n), reinterpret_cast<const std::uint16_t*>(src), dst);
    case DType::f32: return decode.from_f32(to_int(n), reinterpret_cast<const float*>(src), dst);
    default: std::memcpy(dst, src, to_size(n) * sizeof *dst);
  }
}

void round_rows(const DecodeKernels& decode, const MatView& from, bf16_t* to) {
  for (index_t i = 0; i < from.rows; ++i)
    round_row(decode, from.dtype, from.cols, static_cast<const std::byte*>(from.at(i, 0)),
              to + i * from.cols);
}

// The weights' own tail has an encoding, so that it is not `any`.
SourcePointer open_source(LayerTensors tensors) {
  if (tensors.has(Role::global_scale)) return open_nvfp4(std::move(tensors));
  constexpr decltype(&open_plain) kByEncoding[] = {nullptr,   open_plain, open_packed,
                                                   open_gptq, open_mxfp4, open_kt};
  return kByEncoding[to_size(tensors.encoding())](std::move(tensors));
}

const std::vector<index_t>& shape_of(const LayerTensors& tensors, Projection p, Role role, std::size_t rank) {
  const Entry& entry = tensors.first(p, role);
  const auto& shape = entry.tensor.shape;
  if (shape.size() != rank)
    tensors.fail(entry, "has shape {}, wanted {} dimensions", shape_text(shape), rank);
  if (std::ranges::find(shape, 0) != shape.end())
    tensors.fail(entry, "has shape {}, wanted no 0", shape_text(shape));
  return shape;
}

int experts_in(const LayerTensors& tensors, index_t experts) {
  constexpr index_t kMostExperts = 1'000'000;  // far above any model, so that an int counts them
  if (experts > kMostExperts)
    tensors.fail(tensors.first(Role::weight), "has {} experts, wanted at most {}", experts, kMostExperts);
  return to_int(experts);
}

index_t group_of(const LayerTensors& tensors, const Entry& scales, index_t cols, index_t groups) {
  if (groups == 1) return 0;
  // Groups that are no power of two are larger ones whose last is cut off, in every file seen so far.
  const index_t group = groups < 1 || cols % groups != 0 ? 0 : cols / groups;
  if (group < 32 || !std::has_single_bit(static_cast<std::uint64_t>(group)))
    tensors.fail(scales, "has {} scales for {} columns, wanted one, or one for each 32, 64, 128 and so on",
                 groups, cols);
  return group;
}

void want_type(const LayerTensors& tensors, Role role, std::string_view types) {
  const Entry& entry = tensors.first(role);
  for (std::size_t at = 0; at < types.size();) {
    const auto end = std::min(types.find(' ', at), types.size());
    if (types.substr(at, end - at) == entry.tensor.type->name) return;
    at = end + 1;
  }
  tensors.fail(entry, "is {}, wanted one of {}", entry.tensor.type->name, types);
}

}  // namespace kt
