#include "weights/convert.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "base/error.h"
#include "gemm/decode.h"
#include "weights/grids.h"

namespace kt {

namespace {

// The rows of the source, each widened when it is asked for.
class Rows {
 public:
  explicit Rows(const MatView& source) : source_(source), row_(to_size(source.cols)) {}

  const float* operator()(index_t row) {
    const auto n = row_.size();
    float* to = row_.data();
    if (source_.dtype == DType::f32) {
      std::memcpy(to, source_.at(row, 0), n * sizeof *to);
    } else {
      const auto* from = static_cast<const bf16_t*>(source_.at(row, 0));
      for (std::size_t i = 0; i < n; ++i) to[i] = to_float(from[i]);
    }
    std::int32_t largest = 0;
    for (std::size_t i = 0; i < n; ++i)
      largest = std::max(largest, std::bit_cast<std::int32_t>(to[i]) & 0x7fffffff);
    if (largest >= 0x7f800000) complain(row);
    return to;
  }

 private:
  [[noreturn]] void complain(index_t row) const {
    std::size_t col = 0;
    while (std::isfinite(row_[col])) ++col;
    throw ValueError(
        message("the weight in row {}, column {} is {}, wanted finite ones", row, col, row_[col]));
  }

  MatView source_;
  std::vector<float> row_;
};

// The weight of the largest magnitude. In integers, whose maxima are vectors.
float peak_of(const float* weights, index_t n) {
  std::int32_t most = 0, least = 0;
  for (index_t i = 0; i < n; ++i) {
    const auto bits = std::bit_cast<std::int32_t>(weights[i]);
    most = std::max(most, bits);
    least = std::max(least, static_cast<std::int32_t>(static_cast<std::uint32_t>(bits) ^ 0x80000000u));
  }
  return most >= least ? std::bit_cast<float>(most) : -std::bit_cast<float>(least);
}

constexpr index_t kLanes = 8;  // parts that a sum is taken in, so that they are vectors

// n is a multiple of kLanes.
template <class Grid>
float squared_error(const float* x, index_t n, float scale) {
  const float inverse = 1 / scale;
  std::array<float, kLanes> sums{};
  for (index_t i = 0; i < n; i += kLanes)
    for (index_t lane = 0; lane < kLanes; ++lane) {
      const float off = x[i + lane] - Grid::nearest(x[i + lane] * inverse) * scale;
      sums[to_size(lane)] += off * off;
    }
  float sum = 0;
  for (const float part : sums) sum += part;
  return sum;
}

// The scale of n weights. Errors are compared relative to the peak, where no square leaves the range of fp32.
template <class Grid>
float best_scale(const float* weights, index_t n, ScaleType type, std::vector<float>& relative) {
  const float peak = peak_of(weights, n);
  float best = 1, least = std::numeric_limits<float>::infinity();
  if (peak == 0) return best;
  const float unit = std::fabs(peak);
  relative.resize(to_size(round_up(n, kLanes)));
  float* x = relative.data();
  for (index_t i = 0; i < n; ++i) x[i] = weights[i] / unit;
  std::fill(relative.begin() + n, relative.end(), 0.0f);
  for (const float factor : Grid::factors) {
    const float scale = grids::as_stored(type, Grid::unit(peak) * factor);
    if (scale == 0 || !std::isfinite(to_float(to_bf16(Grid::nearest(peak / scale) * scale)))) continue;
    const float error = squared_error<Grid>(x, std::ssize(relative), scale / unit);
    if (error < least) least = error, best = scale;
  }
  return best;
}

template <class Grid>
constexpr bool kByPeak = requires { &Grid::scale_of; };  // else by the error
template <class Grid>
constexpr bool kGlobalScale = requires { &Grid::global_scale_of; };

// Chosen for all of a matrix and written to it; 1 where the format has none.
template <class Grid>
float choose_global_scale(const MutableWeight& into, Rows& rows) {
  float scale = 1;
  if constexpr (kGlobalScale<Grid>) {
    float peak = 0;
    for (index_t i = 0; i < into.rows; ++i) peak = std::max(peak, std::fabs(peak_of(rows(i), into.cols)));
    scale = Grid::global_scale_of(peak);
    std::memcpy(into.global_scale, &scale, sizeof scale);
  }
  return scale;
}

// The scales of a row, and of the rows that share them.
template <class Grid>
class Scales {
 public:
  Scales(const MutableWeight& into, Rows& rows)
      : into_(into),
        rows_(rows),
        global_scale_(choose_global_scale<Grid>(into, rows)),
        scales_(to_size(ceil_div(into.cols, into.group()))) {}

  float of_group(index_t group) const { return scales_[to_size(group)]; }
  // For `row` and those behind it that share its scales.
  void choose(index_t row) {
    const index_t end = std::min(row + into_.type.scale_rows, into_.rows);
    std::fill(scales_.begin(), scales_.end(), 0.0f);
    for (index_t i = row; i < end; ++i) look_at(rows_(i));
    for (index_t g = 0; g < std::ssize(scales_); ++g) {
      float& scale = scales_[to_size(g)];
      if constexpr (kByPeak<Grid>) scale = Grid::scale_of(scale, global_scale_);
      grids::store_scale(into_, row / into_.type.scale_rows * std::ssize(scales_) + g, scale);
      scale *= global_scale_;
    }
  }

 private:
  void look_at(const float* weights) {
    for (index_t begin = 0, g = 0; begin < into_.cols; begin += into_.group(), ++g) {
      const index_t n = std::min(into_.group(), into_.cols - begin);
      float& scale = scales_[to_size(g)];
      if constexpr (kByPeak<Grid>)
        scale = std::max(scale, std::fabs(peak_of(weights + begin, n)));
      else
        scale = best_scale<Grid>(weights + begin, n, into_.type.scale, relative_);
    }
  }

  const MutableWeight& into_;
  Rows& rows_;
  float global_scale_;
  std::vector<float> scales_, relative_;
};

template <class Grid>
void encode(const float* weights, index_t n, float scale, std::uint8_t* codes) {
  for (index_t i = 0; i < n; ++i) codes[i] = Grid::code(weights[i] / scale);
}

// Two codes a byte, the lower bits first; codes has a zero behind an odd number of them.
void pack_pairs(const std::uint8_t* codes, index_t bytes, std::byte* to) {
  for (index_t i = 0; i < bytes; ++i) to[i] = static_cast<std::byte>(codes[2 * i] | codes[2 * i + 1] << 4);
}

// In kLanes parts, added in order.
QuantError error_of(const float* weights, const bf16_t* decoded, index_t n) {
  std::array<double, kLanes> error{}, norm{};
  const auto add = [&](index_t i, std::size_t lane) {
    const double weight = weights[i], off = weight - to_float(decoded[i]);
    error[lane] += off * off;
    norm[lane] += weight * weight;
  };
  index_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (std::size_t lane = 0; lane < kLanes; ++lane) add(i + static_cast<index_t>(lane), lane);
  for (; i < n; ++i) add(i, 0);
  QuantError sum;
  for (std::size_t lane = 0; lane < kLanes; ++lane) sum.error += error[lane], sum.norm += norm[lane];
  return sum;
}

template <class Grid>
QuantError quantize_as(const KernelSet& kernels, const MatView& source, const MutableWeight& into) {
  const Weight coded = frozen(into);
  const index_t cols = into.cols, group = into.group(), row_bytes = into.code_bytes(cols);
  Rows rows(source);
  Scales<Grid> scales(into, rows);
  std::vector<std::uint8_t> codes(to_size(cols + 1));
  std::vector<bf16_t> decoded(to_size(cols));
  QuantError total;
  for (index_t row = 0; row < into.rows; ++row) {
    if (row % into.type.scale_rows == 0) scales.choose(row);
    const float* weights = rows(row);
    for (index_t begin = 0, g = 0; begin < cols; begin += group, ++g)
      encode<Grid>(weights + begin, std::min(group, cols - begin), scales.of_group(g), codes.data() + begin);
    std::byte* to = into.codes + row * row_bytes;
    if (traits_of(into.type.format).bits == 4)
      pack_pairs(codes.data(), row_bytes, to);
    else
      std::memcpy(to, codes.data(), to_size(row_bytes));

    decode(kernels, {&coded, {row, row + 1}, {0, cols}}, decoded.data(), cols);
    const QuantError of_row = error_of(weights, decoded.data(), cols);
    total.error += of_row.error;
    total.norm += of_row.norm;
  }
  return total;
}

struct Quantizer {
  bool (*takes)(const WeightType& type);
  QuantError (*quantize)(const KernelSet& kernels, const MatView& source, const MutableWeight& into);
};

template <class... Grid>
constexpr std::array<Quantizer, sizeof...(Grid) + 1> by_format(grids::List<Grid...>) {
  return {{{nullptr, nullptr}, {&Grid::takes, &quantize_as<Grid>}...}};
}

constexpr auto kQuantizers = by_format(grids::All{});
static_assert(kQuantizers.size() == formats.size());

}  // namespace

QuantError quantize(const KernelSet& kernels, const MatView& source, const MutableWeight& into) {
  KT_CHECK(source.dtype == DType::bf16 || source.dtype == DType::f32,
           "weights to quantise are {}, wanted bfloat16 or float32", name_of(source.dtype));
  KT_CHECK(source.rows == into.rows && source.cols == into.cols,
           "weights to quantise are {} x {}, wanted {} x {}", source.rows, source.cols, into.rows, into.cols);
  const Quantizer& to = kQuantizers[to_size(into.type.format)];
  KT_CHECK(to.takes != nullptr && !into.type.zero_points &&
               into.type.global_scale == traits_of(into.type.format).quantized.global_scale &&
               to.takes(into.type),
           "cannot quantise to {} with scales for {} x {}", name_of(into.type.format), into.type.scale_rows,
           into.type.scale_cols);
  return to.quantize(kernels, source, into);
}

}  // namespace kt
