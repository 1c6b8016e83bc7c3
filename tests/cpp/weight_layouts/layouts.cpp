#include "layouts.h"

#include <algorithm>
#include <cstring>
#include <functional>

#include "base/split.h"
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

// Where the weights are that the panel from this column on is made of. They are fetched while the strip
// before it is multiplied: each of the `tiles` results of a panel's weights fetches its share.
using WeightsAt = std::function<Ahead(index_t)>;

Ahead share(Ahead ahead, index_t tiles, index_t tile) {
  const Range lines = split(ahead.lines, tiles, tile);
  return {ahead.first + lines.begin * ahead.line, ahead.run, ahead.line, static_cast<int>(lines.size())};
}

// gemm.h's multiply, or that with prefetching: ahead(i, j) for the tile at row i, column j of c.
void product(const Bench& bench, const Term& term, float* c,
             const std::function<Ahead(index_t i, index_t j)>& ahead) {
  const GemmKernels& gemm = bench.kernels.gemm;
  const index_t rows = term.a.rows, cols = term.b.cols, stride = result_stride(bench.kernels, cols);
  if (!bench.prefetch) return multiply(bench.kernels, {&term, 1}, c, stride);
  if (gemm.begin != nullptr) gemm.begin();
  for (index_t j = 0; j < cols; j += gemm.nr)
    for (index_t i = 0; i < rows; i += gemm.mr)
      bench.direct->multiply(static_cast<int>(std::min<index_t>(gemm.mr, rows - i)),
                             static_cast<int>(std::min<index_t>(gemm.nr, cols - j)),
                             static_cast<int>(term.a.k), term.a.data + i / gemm.mr * term.a.panel_bytes,
                             term.b.data + j / gemm.nr * term.b.panel_bytes, c + i * stride + j, stride,
                             ahead(i, j));
  if (gemm.end != nullptr) gemm.end();
}

// y [m, n] = tokens [m, k] * B, where weights_of(cols) gives columns of B in panels.
void tokens_left(const Bench& bench, MatView tokens, index_t n, bf16_t* y, Arena& scratch,
                 const std::function<PackedB(Range cols)>& weights_of, const WeightsAt& weights_at) {
  const GemmKernels& gemm = bench.kernels.gemm;
  const index_t part_rows = round_up(32, gemm.mr), tiles = ceil_div(tokens.rows, gemm.mr);
  const index_t width = strip(bench, tokens.cols, gemm.nr);
  const PackedA packed = pack_a(bench.kernels, {tokens}, scratch);
  for_strips(n, width, [&](Range cols) {
    const Arena::Frame frame(scratch);
    const PackedB weights = weights_of(cols);
    const index_t stride = result_stride(bench.kernels, cols.size());
    auto* c = scratch.take<float>(part_rows * stride);
    for_strips(tokens.rows, part_rows, [&](Range rows) {
      product(bench, {rows_of(bench.kernels, packed, rows), weights}, c, [&](index_t i, index_t j) {
        const index_t next = cols.begin + j + width;
        return next < n ? share(weights_at(next), tiles, (rows.begin + i) / gemm.mr) : Ahead{};
      });
      store(bench, c, stride, rows.size(), cols, n, y + rows.begin * n);
    });
  });
}

MatView natural(const Shape& shape, const void* w) { return view(w, DType::bf16, shape.out, shape.in); }

// A: natural order, packed strip by strip.
void natural_forward(const Bench& bench, const void* w, MatView x, bf16_t* y, Arena& scratch) {
  const Shape& shape = bench.shape;
  const GemmKernels& gemm = bench.kernels.gemm;
  const index_t width = strip(bench, shape.in, gemm.mr), tiles = ceil_div(x.rows, gemm.nr);
  const PackedB packed = pack_b_cols(bench.kernels, {x}, scratch);
  for_strips(shape.out, width, [&](Range cols) {
    const Arena::Frame frame(scratch);
    const PackedA weights =
        pack_a(bench.kernels, {natural(shape, w).block(cols.begin, 0, cols.size(), shape.in)}, scratch);
    auto* c = scratch.take<float>(round_up(cols.size(), gemm.mr) * gemm.nr);
    for_strips(x.rows, gemm.nr, [&](Range rows) {
      const Arena::Frame part_frame(scratch);
      product(bench, {weights, cols_of(bench.kernels, packed, rows)}, c, [&](index_t i, index_t) {
        const index_t next = cols.begin + i + width;
        if (next >= shape.out) return Ahead{};
        const Ahead panel{static_cast<const char*>(natural(shape, w).at(next, 0)), 64 * gemm.mr, 64, gemm.mr};
        return share(panel, tiles, rows.begin / gemm.nr);
      });
      store_transposed(bench, c, gemm.nr, rows.size(), cols, shape.out, y + rows.begin * shape.out, scratch);
    });
  });
}

// The memory of 32 columns of W.
Ahead natural_column(const Shape& shape, const void* w, index_t col) {
  const ptrdiff_t row = shape.in * static_cast<index_t>(sizeof(bf16_t));
  return {static_cast<const char*>(natural(shape, w).at(0, col)), 32 * row, row, 32};
}

void natural_backward(const Bench& bench, const void* w, MatView dy, bf16_t* dx, Arena& scratch) {
  const Shape& shape = bench.shape;
  const auto weights_of = [&](Range cols) {
    return pack_b_rows(bench.kernels, {natural(shape, w).block(0, cols.begin, shape.out, cols.size())},
                       scratch);
  };
  tokens_left(bench, dy, shape.in, dx, scratch, weights_of,
              [&](index_t col) { return natural_column(shape, w, col); });
}

// B and C: panels of [k / 2][32][2], stored for one direction. In that direction they are used as they are,
// in the other, where they are [n / 2][32 of k][2], their blocks are turned strip by strip.
template <index_t Shape::* N>
void panels_as_stored(const Bench& bench, const void* w, MatView tokens, bf16_t* y, Arena& scratch) {
  const index_t n = bench.shape.*N, nr = bench.kernels.gemm.nr, k = tokens.cols;
  const PackedB all{static_cast<const char*>(w), n, k, nr * k * static_cast<index_t>(sizeof(bf16_t))};
  tokens_left(
      bench, tokens, n, y, scratch, [&](Range cols) { return cols_of(bench.kernels, all, cols); },
      [&](index_t col) { return Ahead{all.data + col / nr * all.panel_bytes, 2048, 64, 32}; });
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
  tokens_left(bench, tokens, n, y, scratch, weights_of, [&](index_t col) {
    return Ahead{reinterpret_cast<const char*>(from + col / nr * block), 2 * nr * n, 64, 32};
  });
}

// D: natural order, forward read by the micro-kernel itself.
void direct_forward(const Bench& bench, const void* w, MatView x, bf16_t* y, Arena& scratch) {
  const Shape& shape = bench.shape;
  const Direct& direct = *bench.direct;
  const int nr = bench.kernels.gemm.nr, k = static_cast<int>(shape.in);
  const bool few = direct.forward_few != nullptr && x.rows <= 8;
  const PackedA left = few ? pack_a(bench.kernels, {x}, scratch) : PackedA{};
  const PackedB right = few ? PackedB{} : pack_b_cols(bench.kernels, {x}, scratch);
  const index_t part_rows = 2 * nr;
  auto* c = scratch.take<float>(strip(bench, shape.in, direct.rows) * part_rows);
  if (direct.begin != nullptr) direct.begin();
  for_strips(shape.out, strip(bench, shape.in, direct.rows), [&](Range cols) {
    for_strips(x.rows, part_rows, [&](Range rows) {
      const Arena::Frame frame(scratch);
      for_strips(cols.size(), direct.rows, [&](Range part) {
        const auto* first = static_cast<const bf16_t*>(w) + (cols.begin + part.begin) * shape.in;
        const int count = static_cast<int>(part.size());
        float* to = c + part.begin * part_rows;
        if (few)
          direct.forward_few(count, k, first, shape.in, left.data, to, part_rows);
        else
          direct.forward(count, static_cast<int>(rows.size()), k, first, shape.in,
                         cols_of(bench.kernels, right, rows).data, right.panel_bytes, to, part_rows);
      });
      store_transposed(bench, c, part_rows, rows.size(), cols, shape.out, y + rows.begin * shape.out,
                       scratch);
    });
  });
  if (direct.end != nullptr) direct.end();
}

// Few tokens: whole rows of W pass by, and the result adds up in the cache.
void direct_backward_few(const Bench& bench, const void* w, MatView dy, bf16_t* dx, Arena& scratch) {
  const Shape& shape = bench.shape;
  const int mr = bench.kernels.gemm.mr;
  const PackedA packed = pack_a(bench.kernels, {dy}, scratch);
  auto* c = scratch.take<float>(mr * shape.in);
  std::fill_n(c, mr * shape.in, 0.0f);
  constexpr index_t kBlock = 32;
  for (index_t p = 0; p < shape.out; p += kBlock)
    for (index_t j = 0; j < shape.in; j += 32)
      bench.direct->backward_few(static_cast<int>(dy.rows), kBlock, packed.data + p * mr * 2,
                                 static_cast<const bf16_t*>(w) + p * shape.in + j, shape.in, c + j, shape.in);
  store(bench, c, shape.in, dy.rows, {0, shape.in}, shape.in, dx);
}

// More tokens: as A, but a strip is packed a few rows at a time over its whole width.
void direct_backward(const Bench& bench, const void* w, MatView dy, bf16_t* dx, Arena& scratch) {
  if (bench.direct->backward_few != nullptr && dy.rows <= bench.kernels.gemm.mr)
    return direct_backward_few(bench, w, dy, dx, scratch);
  const Shape& shape = bench.shape;
  const index_t panel_bytes = bench.kernels.gemm.nr * shape.out * static_cast<index_t>(sizeof(bf16_t));
  const auto weights_of = [&](Range cols) {
    auto* panels = scratch.take<char>(cols.size() / bench.kernels.gemm.nr * panel_bytes);
    pack_strip(static_cast<const bf16_t*>(w) + cols.begin, shape.in, static_cast<int>(shape.out),
               static_cast<int>(cols.size()), panels, panel_bytes);
    return PackedB{panels, cols.size(), shape.out, panel_bytes};
  };
  tokens_left(bench, dy, shape.in, dx, scratch, weights_of,
              [&](index_t col) { return natural_column(shape, w, col); });
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
    if (prefetch) layouts_.push_back({"A natural, prefetch", a, natural_forward, natural_backward, true});
    layouts_.push_back({prefetch ? "B forward panels, prefetch" : "B forward panels", b,
                        panels_as_stored<&Shape::out>, panels_turned<&Shape::in>, prefetch});
    layouts_.push_back({prefetch ? "C backward panels, prefetch" : "C backward panels", c,
                        panels_turned<&Shape::out>, panels_as_stored<&Shape::in>, prefetch});
  }
  layouts_.push_back({"D natural, direct", a, direct_forward, direct_backward, true});
}

}  // namespace kt::layouts
