#include "gemm/gemm.h"

#include <array>
#include <cassert>

#include "base/view.h"

namespace kt {

namespace {

constexpr index_t kLine = 64;  // bytes: panels start on a cache line, and are fetched by lines

const std::uint16_t* bf16(const void* data) { return static_cast<const std::uint16_t*>(data); }

// The source in bf16: itself, or a rounded copy in scratch.
Rows in_bf16(const KernelSet& kernels, Rows source, Arena& scratch) {
  const MatView& m = source.matrix;
  if (m.dtype == DType::bf16) return source;
  assert(m.dtype == DType::f32 && source.index == nullptr);
  auto* copy = scratch.take<std::uint16_t>(m.rows * m.cols);
  const bool dense = m.stride == m.cols;  // then as one row: the decoder asks for more than a short one ahead
  const index_t rows = dense ? 1 : m.rows, cols = dense ? m.rows * m.cols : m.cols;
  for (index_t i = 0; i < rows; ++i)
    kernels.decode.from_f32(to_int(cols), static_cast<const float*>(m.at(i, 0)), copy + i * cols);
  return {view(copy, DType::bf16, m.rows, m.cols)};
}

RowSource from_row(const Rows& source, index_t row) {
  const MatView& m = source.matrix;
  if (source.index != nullptr) return {bf16(m.data), m.stride, source.index + row};
  return {bf16(m.at(row, 0)), m.stride, nullptr};
}

index_t panel_bytes(const GemmKernels& gemm, index_t width, index_t k) {
  return round_up(width * round_up(k, gemm.k_align) * gemm.element_bytes, kLine);
}

// Panels of `width` rows each, which run along k.
template <class Packed>
Packed pack_rows(char* panels, const KernelSet& kernels, PackRows* pack, int width, const Rows& source) {
  assert(source.matrix.dtype == DType::bf16);
  const index_t rows = source.matrix.rows, k = source.matrix.cols;
  const index_t bytes = panel_bytes(kernels.gemm, width, k);
  for (index_t i = 0; i < rows; i += width)
    pack(from_row(source, i), to_int(std::min<index_t>(width, rows - i)), to_int(k),
         panels + i / width * bytes);
  return {panels, rows, k, bytes};
}

}  // namespace

index_t packed_a_bytes(const KernelSet& kernels, index_t rows, index_t k) {
  return ceil_div(rows, kernels.gemm.mr) * panel_bytes(kernels.gemm, kernels.gemm.mr, k);
}

index_t packed_b_bytes(const KernelSet& kernels, index_t cols, index_t k) {
  return ceil_div(cols, kernels.gemm.nr) * panel_bytes(kernels.gemm, kernels.gemm.nr, k);
}

PackedA pack_a_into(char* panels, const KernelSet& kernels, Rows source) {
  return pack_rows<PackedA>(panels, kernels, kernels.gemm.pack_a, kernels.gemm.mr, source);
}

PackedB pack_b_cols_into(char* panels, const KernelSet& kernels, Rows source) {
  return pack_rows<PackedB>(panels, kernels, kernels.gemm.pack_b_cols, kernels.gemm.nr, source);
}

PackedA pack_a(const KernelSet& kernels, Rows source, Arena& scratch) {
  source = in_bf16(kernels, source, scratch);
  const MatView& m = source.matrix;
  if (kernels.gemm.in_place && source.index == nullptr && m.cols % 2 == 0) {
    const index_t row_bytes = m.stride * static_cast<index_t>(sizeof(bf16_t));
    return {static_cast<const char*>(m.data), m.rows, m.cols, kernels.gemm.mr * row_bytes, row_bytes};
  }
  return pack_a_into(scratch.take<char>(packed_a_bytes(kernels, m.rows, m.cols)), kernels, source);
}

PackedB pack_b_cols(const KernelSet& kernels, Rows source, Arena& scratch) {
  source = in_bf16(kernels, source, scratch);
  const MatView& m = source.matrix;
  return pack_b_cols_into(scratch.take<char>(packed_b_bytes(kernels, m.rows, m.cols)), kernels, source);
}

PackedB pack_b_rows_into(char* panels, const KernelSet& kernels, Rows source) {
  const GemmKernels& gemm = kernels.gemm;
  const index_t k = source.matrix.rows, cols = source.matrix.cols, bytes = panel_bytes(gemm, gemm.nr, k);
  gemm.pack_b_rows(from_row(source, 0), to_int(k), to_int(cols), panels, bytes);
  return {panels, cols, k, bytes};
}

PackedB pack_b_rows(const KernelSet& kernels, Rows source, Arena& scratch) {
  source = in_bf16(kernels, source, scratch);
  const MatView& m = source.matrix;
  return pack_b_rows_into(scratch.take<char>(packed_b_bytes(kernels, m.cols, m.rows)), kernels, source);
}

// Panel by panel: what is decoded is read again while it lies in the nearest cache.
PackedA pack_a(const KernelSet& kernels, const WeightBlock& weight, Arena& scratch) {
  const index_t rows = weight.rows.size(), k = weight.cols.size(), mr = kernels.gemm.mr;
  if (weight.is_bf16() || (kernels.gemm.in_place && k % 2 == 0))
    return pack_a(kernels, Rows{in_bf16(kernels, weight, scratch)}, scratch);
  auto* panels = scratch.take<char>(packed_a_bytes(kernels, rows, k));
  const index_t bytes = panel_bytes(kernels.gemm, mr, k);
  const Arena::Frame frame(scratch);
  auto* decoded = scratch.take<bf16_t>(mr * k);
  for (index_t i = 0; i < rows; i += mr) {
    const Range part{i, std::min(rows, i + mr)};
    decode(kernels, weight.rows_of(part), decoded, k);
    pack_a_into(panels + i / mr * bytes, kernels, {view(decoded, DType::bf16, part.size(), k)});
  }
  return {panels, rows, k, bytes};
}

PackedB pack_b_rows(const KernelSet& kernels, const WeightBlock& weight, Arena& scratch) {
  const index_t k = weight.rows.size(), cols = weight.cols.size();
  auto* panels = scratch.take<char>(packed_b_bytes(kernels, cols, k));
  const Arena::Frame frame(scratch);
  return pack_b_rows_into(panels, kernels, {in_bf16(kernels, weight, scratch)});
}

PackedA rows_of(const KernelSet& kernels, PackedA a, Range rows) {
  assert(rows.begin % kernels.gemm.mr == 0 && rows.end <= a.rows);
  return {a.data + rows.begin / kernels.gemm.mr * a.panel_bytes, rows.size(), a.k, a.panel_bytes,
          a.row_bytes};
}

PackedB cols_of(const KernelSet& kernels, PackedB b, Range cols) {
  assert(cols.begin % kernels.gemm.nr == 0 && cols.end <= b.cols);
  return {b.data + cols.begin / kernels.gemm.nr * b.panel_bytes, cols.size(), b.k, b.panel_bytes};
}

namespace {

// What tile `tile` of `tiles`, `k` deep, fetches of `next`: a whole number of lines a step, so that the last
// tiles may find nothing left.
Prefetch prefetch_of(const GemmKernels& gemm, const MatView& next, index_t k, index_t tiles, index_t tile) {
  const auto size = static_cast<index_t>(size_of(next.dtype));
  const index_t lines = ceil_div(next.cols * size, kLine), all = next.rows * lines;
  const index_t steps = std::max<index_t>(1, k * gemm.element_bytes / kLine);
  const index_t count = ceil_div(all, tiles * steps), first = tile * steps * count;
  if (first >= all) return {};
  return {static_cast<const char*>(next.at(first / lines, 0)), next.stride * size, to_int(lines),
          to_int(first % lines), to_int(count)};
}

}  // namespace

void brgemm(const KernelSet& kernels, std::span<const Term> terms, float* c, index_t ldc, bool accumulate) {
  const GemmKernels& gemm = kernels.gemm;
  const index_t rows = terms.front().a.rows, cols = terms.front().b.cols;
  assert(terms.size() <= kMostTerms && ldc >= min_ldc(kernels, cols));
  const index_t tiles = ceil_div(rows, gemm.mr) * ceil_div(cols, gemm.nr);
  index_t tile = 0;
  std::array<BatchElement, kMostTerms> batch;
  if (gemm.begin != nullptr) gemm.begin();
  for (index_t j = 0; j < cols; j += gemm.nr)  // a B panel stays in the nearest cache while A passes by
    for (index_t i = 0; i < rows; i += gemm.mr, ++tile) {
      for (std::size_t t = 0; t < terms.size(); ++t) {
        const auto& [a, b, next] = terms[t];
        assert(a.rows == rows && b.cols == cols && a.k == b.k);
        batch[t] = {a.data + i / gemm.mr * a.panel_bytes, b.data + j / gemm.nr * b.panel_bytes, a.row_bytes,
                    to_int(a.k), prefetch_of(gemm, next, a.k, tiles, tile)};
      }
      gemm.micro_kernel(to_int(std::min<index_t>(gemm.mr, rows - i)),
                        to_int(std::min<index_t>(gemm.nr, cols - j)), batch.data(), to_int(terms.size()),
                        c + i * ldc + j, ldc, accumulate);
    }
  if (gemm.end != nullptr) gemm.end();
}

namespace {

void call_gemv(const KernelSet& kernels, Gemv* gemv, index_t n, const Rows& x, Rows w, float* c, index_t ldc,
               bool accumulate, Arena& scratch) {
  const Arena::Frame frame(scratch);
  w = in_bf16(kernels, w, scratch);
  gemv(to_int(x.matrix.rows), to_int(n), to_int(x.matrix.cols), from_row(x, 0), bf16(w.matrix.data),
       w.matrix.stride, c, ldc, accumulate);
}

}  // namespace

void gemv_nt(const KernelSet& kernels, Rows x, Rows w, float* c, index_t ldc, bool accumulate,
             Arena& scratch) {
  call_gemv(kernels, kernels.gemv.nt, w.matrix.rows, x, w, c, ldc, accumulate, scratch);
}

void gemv_nn(const KernelSet& kernels, Rows x, Rows w, float* c, index_t ldc, bool accumulate,
             Arena& scratch) {
  call_gemv(kernels, kernels.gemv.nn, w.matrix.cols, x, w, c, ldc, accumulate, scratch);
}

namespace {

constexpr index_t kDecodedRows = 32;  // for `nn`: the order of additions depends on it
constexpr index_t kCodedRows = 128;   // that a kernel gets at a time: it looks at all their scales first
static_assert(kCodedRows % kDecodedRows == 0);

// Calls body(rows, the block's rows in bf16), `each` rows decoded at a time.
template <class Body>
void for_decoded(const KernelSet& kernels, const WeightBlock& w, index_t each, Arena& scratch,
                 const Body& body) {
  const index_t n = w.rows.size();
  if (w.is_bf16()) each = n;
  for (index_t i = 0; i < n; i += each) {
    const Arena::Frame frame(scratch);
    const Range rows{i, std::min(n, i + each)};
    body(rows, Rows{in_bf16(kernels, w.rows_of(rows), scratch)});
  }
}

// The product with the codes as they are, if the kernels have it.
bool gemv_of_codes(const KernelSet& kernels, CodedGemv* const* CodedGemvKernels::* direction, const Rows& x,
                   const WeightBlock& w, float* c, index_t ldc, bool accumulate) {
  if (kernels.gemv.coded == nullptr) return false;
  CodedGemv* product = (kernels.gemv.coded->*direction)[to_int(traits_of(w.weight->type.format).codes)];
  return product != nullptr && is_run(w) &&
         product(to_int(x.matrix.rows), from_row(x, 0), coded(w), c, ldc, accumulate) != 0;
}

// Calls body(rows) for the block's rows, kCodedRows at a time; cut where scales change, if that is a multiple
// of `align`.
template <class Body>
void for_strips(const WeightBlock& w, index_t align, const Body& body) {
  const index_t shared = w.weight->type.scale_rows;
  for (index_t i = 0, end; i < w.rows.size(); i = end) {
    end = std::min(w.rows.size(), i + kCodedRows);
    const index_t change = round_up(w.rows.begin + i + 1, shared) - w.rows.begin;
    if (shared > 1 && change % align == 0) end = std::min(end, change);
    body(Range{i, end});
  }
}

// Calls body(columns) for the block's columns, cut such that whole lines of a run are together.
template <class Body>
void for_lines(const WeightBlock& w, const Body& body) {
  constexpr index_t kLineCols = 32;
  const index_t n = w.cols.size(), group = w.weight->group();
  for (index_t j = 0, end; j < n; j = end) {
    const index_t col = w.cols.begin + j;
    end = col % group == 0 ? n : std::min(n, round_up(col, group) - w.cols.begin);
    if (const index_t lines = (end - j) / kLineCols; lines > 0) end = j + lines * kLineCols;
    body(Range{j, end});
  }
}

// Columns `cols` of x, which are as many as rows of a weight.
Rows cols_of(Rows x, Range cols) {
  x.matrix.data = x.matrix.at(0, cols.begin);
  x.matrix.cols = cols.size();
  return x;
}

void decode_and_gemv_nt(const KernelSet& kernels, const Rows& x, const WeightBlock& w, float* c, index_t ldc,
                        bool accumulate, Arena& scratch) {
  constexpr index_t kDecodedBytes = 32 << 10;  // much of the first cache level
  const index_t each = std::max(index_t{1}, kDecodedBytes / (2 * w.cols.size()));
  for_decoded(kernels, w, each, scratch, [&](Range rows, const Rows& decoded) {
    gemv_nt(kernels, x, decoded, c + rows.begin, ldc, accumulate, scratch);
  });
}

void decode_and_gemv_nn(const KernelSet& kernels, const Rows& x, const WeightBlock& w, float* c, index_t ldc,
                        bool accumulate, Arena& scratch) {
  for_decoded(kernels, w, kDecodedRows, scratch, [&](Range rows, const Rows& decoded) {
    gemv_nn(kernels, cols_of(x, rows), decoded, c, ldc, accumulate || rows.begin > 0, scratch);
  });
}

}  // namespace

void gemv_nt(const KernelSet& kernels, Rows x, const WeightBlock& w, float* c, index_t ldc, bool accumulate,
             Arena& scratch) {
  if (w.is_bf16()) return decode_and_gemv_nt(kernels, x, w, c, ldc, accumulate, scratch);
  for_strips(w, 1, [&](Range rows) {
    const WeightBlock strip = w.rows_of(rows);
    float* to = c + rows.begin;
    if (!gemv_of_codes(kernels, &CodedGemvKernels::nt, x, strip, to, ldc, accumulate))
      decode_and_gemv_nt(kernels, x, strip, to, ldc, accumulate, scratch);
  });
}

void gemv_nn(const KernelSet& kernels, Rows x, const WeightBlock& w, float* c, index_t ldc, bool accumulate,
             Arena& scratch) {
  if (w.is_bf16()) return decode_and_gemv_nn(kernels, x, w, c, ldc, accumulate, scratch);
  for_lines(w, [&](Range cols) {
    for_strips(w, kDecodedRows, [&](Range rows) {
      const WeightBlock strip = w.cols_of(cols).rows_of(rows);
      const Rows part = cols_of(x, rows);
      const bool add = accumulate || rows.begin > 0;
      if (!gemv_of_codes(kernels, &CodedGemvKernels::nn, part, strip, c + cols.begin, ldc, add))
        decode_and_gemv_nn(kernels, part, strip, c + cols.begin, ldc, add, scratch);
    });
  });
}

index_t min_ldc(const KernelSet& kernels, index_t cols) { return round_up(cols, kernels.gemm.nr); }

}  // namespace kt
