// Codes of 4 bits: int4 in words of 32 bits (compressed-tensors, GPTQ and AWQ), and floats: MXFP4 as gpt-oss
// has it, NVFP4 as compressed-tensors and ModelOpt have it.
#include <algorithm>
#include <cstring>
#include <utility>

#include "weights/convert.h"
#include "weights/json.h"
#include "weights/layer_source.h"

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

constexpr std::uint32_t kGptqEights = 0x77777777u, kAwqEights = 0x88888888u;  // zero points of 8 in a word

// GPTQ: qweight [in / 8, out]; AWQ: [in, out / 8]. Both: scales [groups, out], qzeros [groups, out / 8].
class WordsSource final : public LayerSource {
 public:
  WordsSource(LayerTensors tensors, LayerInfo info, bool awq)
      : LayerSource(std::move(tensors), info, false), awq_(awq) {
    Arena scratch;
    for (const Projection p : this->tensors().projections()) check_order(0, p, scratch);
  }

 private:
  void read_matrix(int expert, Projection p, const MutableWeight& into, Arena& scratch,
                   const DecodeKernels&) const override {
    check_order(expert, p, scratch);
    const index_t out = into.rows, in = into.cols, groups = ceil_div(in, into.group());
    const auto codes = tensors().read<std::uint32_t>(tensors().at(expert, p, Role::weight), scratch);
    if (awq_) {
      awq_codes(codes.data(), in, out, into.codes);
    } else {  // a word is 8 columns of a row as int4 has them
      transpose(codes.data(), out, in / kCodesInWord, out, reinterpret_cast<std::uint32_t*>(into.codes),
                in / kCodesInWord);
    }
    const Entry& scale_entry = tensors().at(expert, p, Role::scale);
    const auto scales = read_floats(scale_entry, scratch);
    transpose(reinterpret_cast<const std::uint32_t*>(scales.data()), out, groups, out,
              reinterpret_cast<std::uint32_t*>(into.scales), groups);
    check_scales(scale_entry, expert, frozen(into));
    if (into.type.zero_points) {
      const auto words = tensors().read<std::uint32_t>(tensors().at(expert, p, Role::zeros), scratch);
      unpack_zeros(words.data(), 1, out / kCodesInWord, out, groups, awq_ ? kAwqOrder : kGptqOrder,
                   into.zeros);
    }
  }

  bool awq_;
};

bool all_zeros_are(const LayerTensors& tensors, int expert, Projection p, std::uint32_t word,
                   Arena& scratch) {
  const Arena::Frame frame(scratch);
  const auto words = tensors.read<std::uint32_t>(tensors.at(expert, p, Role::zeros), scratch);
  return std::ranges::all_of(words, [&](std::uint32_t w) { return w == word; });
}

// Whether a zero point of the projection is not 8: symmetric files spell out 8 everywhere.
bool has_zero_points(const LayerTensors& tensors, Projection p, bool awq, Arena& scratch) {
  if (!awq && all_zeros_are(tensors, 0, p, kAwqEights, scratch))
    tensors.fail(tensors.first(p, Role::zeros),
                 "holds nothing but 8: the zero points of a symmetric gptq_v2 file, wanted GPTQ's first "
                 "format, which subtracts 1 from each");
  for (int expert = 0; expert < tensors.experts(); ++expert) {
    if (!all_zeros_are(tensors, expert, p, awq ? kAwqEights : kGptqEights, scratch)) return true;
  }
  return false;
}

struct Shape {
  index_t in, out, groups;
};

Shape shape_of_words(const LayerTensors& tensors, Projection p) {
  const auto& words = shape_of(tensors, p, Role::weight, 2);
  const auto& scales = shape_of(tensors, p, Role::scale, 2);
  const index_t groups = scales[0], out = scales[1];
  const bool gptq = words[1] == out;
  if ((!gptq && words[1] * kCodesInWord != out) || out % kCodesInWord != 0)
    tensors.fail(
        tensors.first(p, Role::weight),
        "has shape {} beside scales {}, wanted [in / 8, out] (GPTQ) or [in, out / 8] (AWQ) for [groups, out]",
        shape_text(words), shape_text(scales));
  return {gptq ? words[0] * kCodesInWord : words[0], out, groups};
}

constexpr index_t kMxfp4Group = 32, kMxfp4GroupBytes = 16;
constexpr index_t kNvfp4Group = 16, kCodesInByte = 2;

void check_nvfp4(const LayerTensors& tensors, const LayerInfo& info, Projection p) {
  tensors.want_shape(p, Role::weight, {info.rows(p), info.cols(p) / kCodesInByte});
  tensors.want_shape(p, Role::scale, {info.rows(p), info.cols(p) / kNvfp4Group});
  const Entry& entry = tensors.first(p, Role::global_scale);
  const auto& shape = entry.tensor.shape;
  if (!shape.empty() && shape != std::vector<index_t>{1})
    tensors.fail(entry, "has shape {}, wanted one number: [] or [1]", shape_text(shape));
}

}  // namespace

SourcePointer open_packed(LayerTensors tensors) {
  want_type(tensors, Role::weight, "I32");
  tensors.want_role(Role::scale, "weight_scale");
  want_type(tensors, Role::scale, "BF16 F16 F32");
  if (tensors.has(Role::zeros)) want_type(tensors, Role::zeros, "I32");
  if (tensors.has(Role::shape)) want_type(tensors, Role::shape, "I64 I32");
  if (tensors.has(Role::order)) want_type(tensors, Role::order, "I32");

  const auto& gate = shape_of(tensors, tensors.projections().front(), Role::weight, 2);
  const auto& down = shape_of(tensors, Projection::down, Role::weight, 2);
  LayerInfo info{{tensors.experts(), down[0], gate[0]}, {}, "compressed-tensors"};
  if (gate[1] * kCodesInWord != info.hidden || down[1] * kCodesInWord != info.intermediate)
    tensors.fail(
        tensors.first(Role::weight),
        "has shape {} and that of down {}, wanted [I, H / 8] and [H, I / 8], 8 codes of 4 bits a word",
        shape_text(gate), shape_text(down));
  tensors.want_shape(Projection::up, Role::weight, gate);

  const bool short_scales = tensors.first(Role::scale).tensor.type->dtype == DType::bf16;
  for (const Projection p : tensors.projections())
    check_groups(tensors, info, p, short_scales ? ScaleType::bf16 : ScaleType::f32);
  return rows_source(std::move(tensors), info, false);
}

SourcePointer open_gptq(LayerTensors tensors) {
  want_type(tensors, Role::weight, "I32");
  tensors.want_role(Role::scale, "scales");
  tensors.want_role(Role::zeros, "qzeros");
  want_type(tensors, Role::scale, "F16 BF16 F32");
  want_type(tensors, Role::zeros, "I32");
  if (tensors.has(Role::order)) want_type(tensors, Role::order, "I32");

  const Shape gate = shape_of_words(tensors, tensors.projections().front());
  const bool awq = tensors.first(Role::weight).tensor.shape[1] != gate.out;
  LayerInfo info{{tensors.experts(), gate.in, gate.out}, {}, awq ? "awq" : "gptq"};
  Arena scratch;
  for (const Projection p : tensors.projections()) {
    const index_t rows = info.rows(p), cols = info.cols(p);
    const index_t words = cols / kCodesInWord, groups = shape_of_words(tensors, p).groups;
    if (cols % kCodesInWord != 0)
      tensors.fail(tensors.first(p, Role::weight), "has {} columns, wanted a multiple of 8", cols);
    tensors.want_shape(p, Role::weight,
                       awq ? std::vector{cols, rows / kCodesInWord} : std::vector{words, rows});
    tensors.want_shape(p, Role::scale, {groups, rows});
    tensors.want_shape(p, Role::zeros, {groups, rows / kCodesInWord});
    if (tensors.has(Role::order)) tensors.want_shape(p, Role::order, {cols});
    info.types[index_of(p)] = {Format::int4, ScaleType::f32, 1,
                               group_of(tensors, tensors.first(p, Role::scale), cols, groups),
                               has_zero_points(tensors, p, awq, scratch)};
  }
  return std::make_unique<WordsSource>(std::move(tensors), info, awq);
}

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
  LayerInfo info{{experts_in(tensors, both[0]), down[1], both[1] / 2}, {}, "mxfp4"};
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
  LayerInfo info{
      {tensors.experts(), down[0], gate[0]}, {}, packed ? "nvfp4, compressed-tensors" : "nvfp4, modelopt"};
  if (info.hidden % kNvfp4Group != 0 || info.intermediate % kNvfp4Group != 0)
    tensors.fail(
        tensors.first(Role::weight),
        "has shape {} and that of down {}, wanted [I, H / 2] and [H, I / 2], H and I multiples of 16",
        shape_text(gate), shape_text(down));
  for (const Projection p : tensors.projections()) check_nvfp4(tensors, info, p);
  info.types.fill({Format::nvfp4, ScaleType::e4m3, 1, kNvfp4Group, false,
                   packed ? GlobalScale::divides : GlobalScale::multiplies});
  return rows_source(std::move(tensors), info, false);
}

}  // namespace kt
