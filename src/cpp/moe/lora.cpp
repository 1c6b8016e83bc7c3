#include "moe/linear.h"

#include <algorithm>
#include <cstring>

#include "cpu/processor.h"
#include "moe/schedule.h"

namespace kt {

namespace {

// The finaliser of SplitMix64 (Steele, Lea, Flood 2014), used as a hash of a counter.
std::uint64_t mix(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

template <class T>
void drop_row(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, T* row) {
  const auto threshold = static_cast<std::uint64_t>(dropout.probability * 0x1p32);
  const std::uint64_t stream =
      static_cast<std::uint64_t>(slot) * projections.size() + static_cast<std::uint64_t>(projection);
  const std::uint64_t key = mix(dropout.seed + mix(stream + 1));
  for (index_t i = 0; i < n; ++i) {
    const std::uint64_t bits = mix(key + static_cast<std::uint64_t>(col + i) * 0x9e3779b97f4a7c15u) >> 32;
    if (bits < threshold) row[i] = T{};
  }
}

// The input of a projection's LoRA A: that of the projection, its dropped elements zero.
Rows lora_input(const Pass& pass, Projection p, const BlockRows& rows, Range cols, Arena& scratch) {
  const Rows input = pass.input(p, rows, cols);
  if (!pass.inputs.dropout.active()) return input;
  auto* copy = scratch.take<bf16_t>(rows.count() * cols.size());
  for (index_t i = 0; i < rows.count(); ++i) {
    bf16_t* row = copy + i * cols.size();
    const index_t source = input.index ? input.index[i] : i;
    std::memcpy(row, input.matrix.at(source, 0), to_size(cols.size()) * sizeof(bf16_t));
    drop(pass.inputs.dropout, p, pass.routing.sorted_slots[to_size(rows.first() + i)],
         pass.first_col(p, rows.block) + cols.begin, cols.size(), row);
  }
  return {view(copy, DType::bf16, rows.count(), cols.size())};
}

}  // namespace

void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, bf16_t* row) {
  drop_row(dropout, projection, slot, col, n, row);
}

void drop(const Dropout& dropout, Projection projection, index_t slot, index_t col, index_t n, float* row) {
  drop_row(dropout, projection, slot, col, n, row);
}

index_t p_product_floats(const Pass& pass, Projection p, const Block& block) {
  return pass.rank(p) * min_ldc(pass.kernels(), block.count);
}

index_t p_floats_of_down(const Pass& pass, const Block& block) {
  return p_product_floats(pass, Projection::down, block);
}

void multiply_p(const Pass& pass, Projection p, const Block& block, PackedB packed, float* product,
                Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const Arena::Frame frame(scratch);
  const MatView lora_a = pass.lora_a(p, block);
  const index_t rank = lora_a.rows, in = lora_a.cols, stride = min_ldc(kernels, block.count);
  const bool gemv = by_gemv(block);
  Span span(pass.recorder(scratch), Stage::lora_p);
  span.count(cost_of_shrink(block, rank, in));
  const PackedA a = gemv ? PackedA{} : pack_a(kernels, {lora_a}, scratch);
  for_mc_ranges(block, kernels.gemm.nr, [&](const BlockRows& mc) {
    const Arena::Frame mc_frame(scratch);
    float* to = product + mc.rows.begin;
    if (gemv) {
      auto* by_row = scratch.take<float>(mc.count() * rank);
      gemv_nt(kernels, lora_input(pass, p, mc, {0, in}, scratch), {lora_a}, by_row, rank,
              /*accumulate=*/false, scratch);
      kernels.epilogue.transpose(by_row, rank, to_int(mc.count()), to_int(rank), to, stride);
    } else {
      const bool as_packed = packed.data != nullptr && !pass.inputs.dropout.active();
      const PackedB rows = as_packed
                               ? cols_of(kernels, packed, mc.rows)
                               : pack_b_cols(kernels, lora_input(pass, p, mc, {0, in}, scratch), scratch);
      const Term term{a, rows};
      brgemm(kernels, {&term, 1}, to, stride);
    }
  });
}

void round_p(const Pass& pass, Projection p, const Block& block, float* product) {
  const index_t stride = min_ldc(pass.kernels(), block.count);
  for (index_t i = 0; i < pass.rank(p); ++i) {
    float* row = product + i * stride;
    const auto round_to = [&](const ByBlock& matrices) {
      if (!matrices.empty())
        pass.kernels().epilogue.round_scaled(to_int(block.count), pass.lora_scale(p), row,
                                             matrices[block.index] + i * block.count);
    };
    round_to(pass.p_transposed[index_of(p)]);
    if (p != Projection::down) continue;
    for (index_t j = 0; j < block.count; ++j) row[j] *= pass.route_weight(block.first + j);
    round_to(pass.weighted_p_transposed);
  }
}

index_t packed_input_bytes(const Pass& pass, std::span<const Projection> targets, index_t rows,
                           index_t cols) {
  index_t bytes = packed_b_bytes(pass.kernels(), rows, cols);
  for (const Projection p : targets) bytes += packed_b_bytes(pass.kernels(), rows, pass.rank(p));
  return bytes;
}

void pack_p(const Pass& pass, std::span<const Projection> targets, const Block& block, char* panels,
            PackedInput& input) {
  if (by_gemv(block)) return;
  const KernelSet& kernels = pass.kernels();
  char* behind = panels + packed_b_bytes(kernels, block.count, pass.cols(targets.front(), block));
  for (const Projection p : targets) {
    if (!pass.lora(p)) continue;
    const MatView transposed = pass.transposed_rows(pass.p_transposed[index_of(p)], p, block);
    input.p[index_of(p)] = pack_b_rows_into(behind, kernels, {transposed});
    behind += packed_b_bytes(kernels, block.count, pass.rank(p));
  }
}

index_t q_product_floats(const Pass& pass, Projection p, const Block& block) {
  return block.count * min_ldc(pass.kernels(), pass.rank(p));
}

void multiply_q(const Pass& pass, Projection p, const Block& block, float* product, Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const Arena::Frame frame(scratch);
  const Rows lora_b{pass.lora_b(p, block)};
  const index_t stride = min_ldc(kernels, pass.rank(p));
  const bool gemv = by_gemv(block);
  const PackedB b = gemv ? PackedB{} : pack_b_rows(kernels, lora_b, scratch);
  const PackedA packed = pass.packed_grad[index_of(p)][block.index].rows;
  Span span(pass.recorder(scratch), Stage::lora_q);
  span.count(cost_of_shrink(block, pass.rank(p), pass.rows(p, block)));
  for_mc_ranges(block, backward_mc(pass), [&](const BlockRows& mc) {
    float* to = product + mc.rows.begin * stride;
    if (gemv) {
      gemv_nn(kernels, pass.grad_output(p, mc, {0, pass.rows(p, block)}), lora_b, to, stride,
              /*accumulate=*/false, scratch);
    } else {
      const Term term{rows_of(kernels, packed, mc.rows), b};
      brgemm(kernels, {&term, 1}, to, stride);
    }
  });
}

void round_q(const Pass& pass, Projection p, const Block& block, float* product, Arena& scratch) {
  const Arena::Frame frame(scratch);
  const EpilogueKernels& epilogue = pass.kernels().epilogue;
  const float scale = pass.lora_scale(p);
  const index_t stride = min_ldc(pass.kernels(), pass.rank(p));
  const int rank = to_int(pass.rank(p)), count = to_int(block.count);
  for (index_t i = 0; i < count; ++i) {
    float* row = product + i * stride;
    epilogue.round_scaled(rank, scale, row, pass.lora_q[index_of(p)][block.index] + i * rank);
    const float factor = p == Projection::down ? pass.route_weight(block.first + i) : 1.0f;
    for (int j = 0; j < rank; ++j) row[j] *= factor;
  }
  auto* transposed = scratch.take<float>(rank * block.count);
  epilogue.transpose(product, stride, count, rank, transposed, count);
  for (int j = 0; j < rank; ++j)
    epilogue.round_scaled(count, scale, transposed + j * count,
                          pass.lora_q_transposed[index_of(p)][block.index] + j * count);
}

index_t packed_gradient_bytes(const Pass& pass, Projection p, index_t rows, index_t cols) {
  return packed_a_bytes(pass.kernels(), rows, cols) + packed_a_bytes(pass.kernels(), rows, pass.rank(p));
}

void pack_q(Pass& pass, Projection p, const Block& block, char* panels) {
  if (by_gemv(block)) return;
  const index_t rank = pass.rank(p);
  char* behind = panels + packed_a_bytes(pass.kernels(), block.count, pass.rows(p, block));
  pass.packed_grad[index_of(p)][block.index].q =
      pack_a_into(behind, pass.kernels(), pass.by_route(pass.lora_q[index_of(p)], rank, block, {0, rank}));
}

namespace {

enum class Matrix { a, b };

// Whether shards have their own part of a matrix; else the root has all of it.
bool is_sharded(Projection p, Matrix m) { return p == Projection::down ? m == Matrix::a : m == Matrix::b; }

// dA = Q' input or dB' = P' dOutput of one expert, columns `nc`; `blocks` are its blocks on one shard, or
// where the matrix is not sharded, its roots.
void lora_gradient(const Pass& pass, const LayerGradients& gradients, Projection p, Matrix m,
                   std::span<const Block* const> blocks, Range nc, Arena& scratch) {
  const KernelSet& kernels = pass.kernels();
  const std::size_t i = index_of(p);
  const index_t rank = pass.rank(p), width = nc.size(), stride = min_ldc(kernels, width);
  const ByBlock& own_p = p == Projection::down ? pass.weighted_p_transposed : pass.p_transposed[i];
  const ByBlock& p_or_q = m == Matrix::b ? own_p : pass.lora_q_transposed[i];
  auto* grad = scratch.take<float>(rank * stride);
  for (const Block* block : blocks) {
    const Arena::Frame frame(scratch);
    const Rows rows =
        m == Matrix::b ? pass.grad_output(p, *block, nc) : lora_input(pass, p, *block, nc, scratch);
    const Term term{pack_a(kernels, {pass.transposed_rows(p_or_q, p, *block)}, scratch),
                    pack_b_rows(kernels, rows, scratch)};
    brgemm(kernels, {&term, 1}, grad, stride, /*accumulate=*/block != blocks.front());
  }
  const Block& block = *blocks.front();
  if (m == Matrix::a) {  // [r, in]
    const index_t cols = pass.lora(p).a.cols;
    const index_t first = block.expert * rank * cols + pass.first_col(p, block) + nc.begin;
    for (index_t j = 0; j < rank; ++j)
      pass.store(grad + j * stride, width, gradients.lora_a[i], first + j * cols);
  } else {  // [out, r]
    auto* transposed = scratch.take<float>(width * rank);
    kernels.epilogue.transpose(grad, stride, to_int(rank), to_int(width), transposed, rank);
    const index_t first = block.expert * pass.lora(p).b.rows + pass.first_row(p, block) + nc.begin;
    pass.store(transposed, width * rank, gradients.lora_b[i], first * rank);
  }
}

void add_lora_gradient(Pass& pass, const LayerGradients& gradients, Projection p, Matrix m,
                       std::span<const Block* const> blocks, const TaskGraph::Groups& ready) {
  const GemmKernels& gemm = pass.kernels().gemm;
  const Block& first = *blocks.front();
  const index_t n = m == Matrix::b ? pass.rows(p, first) : pass.cols(p, first);
  const NcRanges ranges = pass.plan.nc_ranges(n, gemm.nr, kBlockRows * gemm.element_bytes);
  TaskGraph::Groups after;
  index_t rows = 0;
  for (const Block* block : blocks) after.push_back(ready[block->index]), rows += block->count;
  pass.tasks.add(
      pass.label(Stage::lora_grad, first), first.node, ranges.count, std::move(after),
      [&pass, &gradients, p, m, ranges, own = std::vector(blocks.begin(), blocks.end())](index_t i,
                                                                                         Arena& scratch) {
        if (ranges[i].size() > 0) lora_gradient(pass, gradients, p, m, own, ranges[i], scratch);
      },
      [rows, rank = pass.rank(p), ranges](index_t i) {
        return Work{2 * rows * rank * ranges[i].size(), 0, 0};
      });
}

// The gradients of an expert without tokens.
void clear_gradients(const LayerInputs& inputs, const LayerGradients& gradients, index_t expert) {
  const auto clear = [expert](const Result& gradient, const StridedBatch& stack) {
    if (!gradient) return;
    const index_t bytes = stack.rows * stack.cols * static_cast<index_t>(size_of(gradient.dtype));
    stream_zeros(static_cast<char*>(gradient.data) + expert * bytes, to_size(bytes));
  };
  for (const Projection p : projections) {
    clear(gradients.lora_a[index_of(p)], inputs.of(p).a);
    clear(gradients.lora_b[index_of(p)], inputs.of(p).b);
  }
}

}  // namespace

void add_lora_gradients(Pass& pass, const LayerGradients& gradients, const TaskGraph::Groups& ready) {
  const Plan& plan = pass.plan;
  for (std::size_t begin = 0, end; begin < plan.blocks.size(); begin = end) {
    std::vector<std::vector<const Block*>> on_shard(plan.shards.size());
    std::vector<const Block*> roots;
    for (end = begin; end < plan.blocks.size() && plan.blocks[end].expert == plan.blocks[begin].expert;
         ++end) {
      on_shard[plan.blocks[end].shard].push_back(&plan.blocks[end]);
      if (plan.is_root(plan.blocks[end])) roots.push_back(&plan.blocks[end]);
    }
    for (const Projection p : projections)
      for (const Matrix m : {Matrix::a, Matrix::b}) {
        if (!(m == Matrix::b ? gradients.lora_b : gradients.lora_a)[index_of(p)]) continue;
        if (!is_sharded(p, m)) {
          add_lora_gradient(pass, gradients, p, m, roots, ready);
          continue;
        }
        for (const auto& blocks : on_shard) add_lora_gradient(pass, gradients, p, m, blocks, ready);
      }
  }
  if (!gradients.clear_idle) return;
  pass.tasks.add(Stage::zero_grad, 0, pass.experts.num_experts, {}, [&](index_t expert, Arena&) {
    if (pass.routing.count(to_int(expert)) == 0) clear_gradients(pass.inputs, gradients, expert);
  });
}

}  // namespace kt
