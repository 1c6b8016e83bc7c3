#include "layouts.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "base/view.h"
#include "kernels.h"

namespace kt::layouts {

namespace {

// Columns of the result (of `k` products each) whose weights fill half the L2 cache.
index_t strip(const Bench& bench, index_t k, index_t tile) {
  const index_t fit = static_cast<index_t>(bench.l2) / 2 / (k * bench.kernels.gemm.element_bytes);
  return std::max<index_t>(1, fit / tile) * tile;
}

template <class Body>
void for_strips(index_t n, index_t width, const Body& body) {
  for (index_t i = 0; i < n; i += width) body(Range{i, std::min(n, i + width)});
}

void store(const Bench& bench, const float* c, index_t ldc, index_t rows, Range cols, index_t n, bf16_t* y) {
  for (index_t i = 0; i < rows; ++i)
    bench.kernels.epilogue.round_scaled(static_cast<int>(cols.size()), 1.0f, c + i * ldc,
                                        y + i * n + cols.begin);
}

void store_transposed(const Bench& bench, const float* c, index_t ldc, index_t rows, Range cols, index_t n,
                      bf16_t* y, Arena& scratch) {
  auto* natural = scratch.take<float>(rows * cols.size());
  bench.kernels.epilogue.transpose(c, ldc, static_cast<int>(cols.size()), static_cast<int>(rows), natural,
                                   cols.size());
  store(bench, natural, cols.size(), rows, cols, n, y);
}

// Where the weights of some columns lie. Those of the next strip are fetched while one is multiplied: each
// part of the tokens fetches its share.
using WeightsAt = std::function<MatView(Range cols)>;

Range after(Range cols, index_t width, index_t n) {
  return {std::min(n, cols.begin + width), std::min(n, cols.end + width)};
}

void product(const Bench& bench, Term term, float* c, index_t stride) {
  if (!bench.prefetch) term.next = {};
  brgemm(bench.kernels, {&term, 1}, c, stride);
}

// y [m, n] = tokens [m, k] * B, where weights_of(cols) gives columns of B in panels.
void tokens_left(const Bench& bench, MatView tokens, index_t n, bf16_t* y, Arena& scratch,
                 const std::function<PackedB(Range cols)>& weights_of, const WeightsAt& weights_at) {
  const GemmKernels& gemm = bench.kernels.gemm;
  const index_t part_rows = round_up(32, gemm.mr);
  const index_t width = strip(bench, tokens.cols, gemm.nr);
  const PackedA packed = pack_a(bench.kernels, {tokens}, scratch);
  for_strips(n, width, [&](Range cols) {
    const Arena::Frame frame(scratch);
    const PackedB weights = weights_of(cols);
    const index_t stride = min_ldc(bench.kernels, cols.size());
    auto* c = scratch.take<float>(part_rows * stride);
    for_strips(tokens.rows, part_rows, [&](Range rows) {
      const MatView next = share(weights_at(after(cols, width, n)), rows, tokens.rows);
      product(bench, {rows_of(bench.kernels, packed, rows), weights, next}, c, stride);
      store(bench, c, stride, rows.size(), cols, n, y + rows.begin * n);
    });
  });
}

MatView natural(const Shape& shape, const void* w) { return view(w, DType::bf16, shape.out, shape.in); }

// A: natural order, packed strip by strip.
void natural_forward(const Bench& bench, const void* w, MatView x, bf16_t* y, Arena& scratch) {
  const Shape& shape = bench.shape;
  const GemmKernels& gemm = bench.kernels.gemm;
  const index_t width = strip(bench, shape.in, gemm.mr);
  const PackedB packed = pack_b_cols(bench.kernels, {x}, scratch);
  for_strips(shape.out, width, [&](Range cols) {
    const Arena::Frame frame(scratch);
    const auto weights_at = [&](Range r) { return natural(shape, w).block(r.begin, 0, r.size(), shape.in); };
    const PackedA weights = pack_a(bench.kernels, {weights_at(cols)}, scratch);
    auto* c = scratch.take<float>(round_up(cols.size(), gemm.mr) * gemm.nr);
    for_strips(x.rows, gemm.nr, [&](Range rows) {
      const Arena::Frame part_frame(scratch);
      const MatView next = share(weights_at(after(cols, width, shape.out)), rows, x.rows);
      product(bench, {weights, cols_of(bench.kernels, packed, rows), next}, c, gemm.nr);
      store_transposed(bench, c, gemm.nr, rows.size(), cols, shape.out, y + rows.begin * shape.out, scratch);
    });
  });
}

void natural_backward(const Bench& bench, const void* w, MatView dy, bf16_t* dx, Arena& scratch) {
  const Shape& shape = bench.shape;
  const auto weights_at = [&](Range cols) {
    return natural(shape, w).block(0, cols.begin, shape.out, cols.size());
  };
  tokens_left(
      bench, dy, shape.in, dx, scratch,
      [&](Range cols) { return pack_b_rows(bench.kernels, {weights_at(cols)}, scratch); }, weights_at);
}

// B and C: panels of [k / 2][32][2], stored for one direction. In that direction they are used as they are,
// in the other, where they are [n / 2][32 of k][2], their blocks are turned strip by strip.
template <index_t Shape::* N>
void panels_as_stored(const Bench& bench, const void* w, MatView tokens, bf16_t* y, Arena& scratch) {
  const index_t n = bench.shape.*N, nr = bench.kernels.gemm.nr, k = tokens.cols;
  const PackedB all{static_cast<const char*>(w), n, k, nr * k * static_cast<index_t>(sizeof(bf16_t))};
  tokens_left(
      bench, tokens, n, y, scratch, [&](Range cols) { return cols_of(bench.kernels, all, cols); },
      [&](Range cols) {
        return view(all.data + cols.begin / nr * all.panel_bytes, DType::bf16, cols.size(), k);
      });
}

template <index_t Shape::* N>
void panels_turned(const Bench& bench, const void* w, MatView tokens, bf16_t* y, Arena& scratch) {
  const index_t n = bench.shape.*N, nr = bench.kernels.gemm.nr, k = tokens.cols, block = nr * nr;
  const auto* from = static_cast<const bf16_t*>(w);
  const auto weights_of = [&](Range cols) {
    auto* to = scratch.take<bf16_t>(cols.size() * k);
    for (index_t p = 0; p < k; p += nr)
      for (index_t j = cols.begin; j < cols.end; j += nr)
        turn_block(from + p * n + j / nr * block, to + (j - cols.begin) * k + p / nr * block);
    return PackedB{reinterpret_cast<const char*>(to), cols.size(), k,
                   nr * k * static_cast<index_t>(sizeof(bf16_t))};
  };
  tokens_left(bench, tokens, n, y, scratch, weights_of, [&](Range cols) {
    return view(from, DType::bf16, k / nr, nr * n).block(0, cols.begin * nr, k / nr, cols.size() * nr);
  });
}

// D: natural order, forward read by the micro-kernel itself; few tokens as the layer multiplies them.
void direct_forward(const Bench& bench, const void* w, MatView x, bf16_t* y, Arena& scratch) {
  const Shape& shape = bench.shape;
  if (x.rows <= kGemvRows) {
    auto* c = scratch.take<float>(x.rows * shape.out);
    gemv_nt(bench.kernels, {x}, {natural(shape, w)}, c, shape.out, false, scratch);
    return store(bench, c, shape.out, x.rows, {0, shape.out}, shape.out, y);
  }
  const Direct& direct = *bench.direct;
  const index_t part_rows = 2 * bench.kernels.gemm.nr, width = strip(bench, shape.in, direct.most_rows);
  const PackedB packed = pack_b_cols(bench.kernels, {x}, scratch);
  auto* c = scratch.take<float>(width * part_rows);
  if (direct.begin != nullptr) direct.begin();
  for_strips(shape.out, width, [&](Range cols) {
    for_strips(x.rows, part_rows, [&](Range rows) {
      const Arena::Frame frame(scratch);
      for_strips(cols.size(), direct.most_rows, [&](Range part) {
        direct.forward(static_cast<int>(part.size()), static_cast<int>(rows.size()),
                       static_cast<int>(shape.in),
                       static_cast<const bf16_t*>(natural(shape, w).at(cols.begin + part.begin, 0)), shape.in,
                       cols_of(bench.kernels, packed, rows).data, packed.panel_bytes,
                       c + part.begin * part_rows, part_rows);
      });
      store_transposed(bench, c, part_rows, rows.size(), cols, shape.out, y + rows.begin * shape.out,
                       scratch);
    });
  });
  if (direct.end != nullptr) direct.end();
}

void direct_backward(const Bench& bench, const void* w, MatView dy, bf16_t* dx, Arena& scratch) {
  const Shape& shape = bench.shape;
  if (dy.rows > kGemvRows) return natural_backward(bench, w, dy, dx, scratch);
  auto* c = scratch.take<float>(dy.rows * shape.in);
  gemv_nn(bench.kernels, {dy}, {natural(shape, w)}, c, shape.in, false, scratch);
  store(bench, c, shape.in, dy.rows, {0, shape.in}, shape.in, dx);
}

}  // namespace

void fill(bf16_t* data, index_t n) {  // of both signs around 1
  std::uint32_t state = 1;
  for (index_t i = 0; i < n; ++i) {
    state = state * 1664525u + 1013904223u;
    data[i] = static_cast<bf16_t>(0x3f00u | ((state >> 16) & 0x80ffu));
  }
}

Stored::Stored(const Bench& bench, index_t experts) {
  const Shape shape = bench.shape;
  const auto bytes = static_cast<std::size_t>(shape.bytes());
  const auto add = [&] {
    return static_cast<char*>(memory_.emplace_back(bytes * static_cast<std::size_t>(experts)).data());
  };
  char* const a = add();
  fill(reinterpret_cast<bf16_t*>(a), experts * shape.out * shape.in);
  layouts_.push_back({"A natural", a, natural_forward, natural_backward, false});
  layouts_.push_back({"A natural, prefetch", a, natural_forward, natural_backward, true});
  if (bench.direct == nullptr) return;  // the others are written for the panels of two sets

  char *const b = add(), *const c = add();
  Arena scratch;
  for (index_t e = 0; e < experts; ++e) {
    const Arena::Frame frame(scratch);
    const Rows w{natural(shape, a + e * shape.bytes())};
    std::memcpy(b + e * shape.bytes(), pack_b_cols(bench.kernels, w, scratch).data, bytes);
    std::memcpy(c + e * shape.bytes(), pack_b_rows(bench.kernels, w, scratch).data, bytes);
  }
  for (const bool prefetch : {false, true}) {
    layouts_.push_back({prefetch ? "B forward panels, prefetch" : "B forward panels", b,
                        panels_as_stored<&Shape::out>, panels_turned<&Shape::in>, prefetch});
    layouts_.push_back({prefetch ? "C backward panels, prefetch" : "C backward panels", c,
                        panels_turned<&Shape::out>, panels_as_stored<&Shape::in>, prefetch});
  }
  layouts_.push_back({"D natural, direct", a, direct_forward, direct_backward, true});
}

}  // namespace kt::layouts
