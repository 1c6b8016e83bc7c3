#include "moe/cost.h"

namespace kt {

namespace {

constexpr index_t kBf16 = sizeof(bf16_t), kFloat = sizeof(float);

// `width` rows or columns of a weight, with their part of its scales.
index_t weight_bytes(const WeightBlock& all, index_t width, index_t k) {
  return all.weight->bytes() * width * k / (all.weight->rows * all.weight->cols);
}

// The product of a block's rows with `width` rows or columns of W, `k` long, and with LoRA's if it is here.
Work cost_of_product(const Pass& pass, Projection p, const Block& block, index_t width, index_t k,
                     bool here) {
  const index_t rank = here ? pass.rank(p) : 0;
  return {2 * block.count * width * (k + rank), weight_bytes(pass.weight(p, block), width, k), 0};
}

}  // namespace

Work cost_of_packing(const Pass& pass, const Block& block) {
  return moved(block.count * pass.experts.hidden * kBf16, 0, block.node);
}

Work cost_of_gate_up(const Pass& pass, const Block& block, Range nc) {
  const index_t matrix = block.count * nc.size() * kBf16;
  Work work{0, matrix, 0};                                                                  // h
  if (!pass.up.empty()) work += moved(std::ssize(pass.gate_up()) * matrix, 0, block.node);  // G, U
  for (const Projection p : pass.gate_up())
    work += cost_of_product(pass, p, block, nc.size(), pass.cols(p, block),
                            /*here=*/true);
  return work;
}

Work cost_of_down(const Pass& pass, std::span<const Block> blocks, Range nc) {
  Work work{0, blocks.front().count * nc.size() * kFloat, 0};
  for (const Block& block : blocks)
    work += cost_of_product(pass, Projection::down, block, nc.size(), pass.cols(Projection::down, block),
                            pass.plan.is_root(block));
  return work;
}

Work cost_of_grad_down(const Pass& pass, const Block& block, Range nc) {
  const index_t matrix = block.count * nc.size() * kBf16;
  const index_t inner = std::ssize(pass.gate_up()) * matrix;  // G, U; and so many dG, dU
  Work work{0, inner + matrix, 0};                            // and h
  work += moved(inner, pass.recompute ? block.node : 0, block.node);
  work += cost_of_product(pass, Projection::down, block, nc.size(), pass.rows(Projection::down, block), true);
  return work;
}

Work cost_of_grad_gate_up(const Pass& pass, std::span<const Block> blocks, Range nc) {
  Work work{0, blocks.front().count * nc.size() * kFloat, 0};
  for (const Block& block : blocks)
    for (const Projection p : pass.gate_up())
      work += cost_of_product(pass, p, block, nc.size(), pass.rows(p, block), pass.plan.is_root(block));
  return work;
}

}  // namespace kt
