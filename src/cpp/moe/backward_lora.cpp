// The part of backward that only LoRA needs: Q = s dOutput B, and the gradients of A and B.
#include <algorithm>

#include "moe/backward.h"

namespace kt {

void Backward::project_grad_b(std::initializer_list<Projection> targets) {
  const index_t part_rows = rows_per_part();
  lease_.parallel_for(std::ssize(blocks_), [&](index_t task, Arena& scratch) {
    const Block block = blocks_[static_cast<std::size_t>(task)];
    for (const Projection p : targets) {
      const LoraPair& lora = inputs_.of(p);
      if (!lora) continue;
      const Arena::Frame frame(scratch);
      const index_t rank = lora.rank(), stride = result_stride(kernels(), rank);
      const PackedB b = pack_b_rows(kernels(), {lora.b[block.expert]}, scratch);
      auto* product = scratch.take<float>(part_rows * stride);
      auto* transposed = scratch.take<float>(rank * part_rows);
      const LowRankGradient& q = grad_low_rank_[index_of(p)];
      for_parts(block, part_rows, [&](Block part) {
        const Arena::Frame part_frame(scratch);
        const Term term{pack_a(kernels(), grad_output(p, part, {0, lora.b.rows}), scratch), b};
        multiply(kernels(), {&term, 1}, product);
        store_low_rank(p, block, part, product, stride, transposed, q);
      });
    }
  });
}

void Backward::store_low_rank(Projection p, Block block, Block part, float* product, index_t stride,
                              float* transposed, const LowRankGradient& q) {
  const EpilogueKernels& epilogue = kernels().epilogue;
  const int rank = static_cast<int>(inputs_.of(p).rank()), count = static_cast<int>(part.count);
  for (index_t i = 0; i < part.count; ++i) {
    float* row = product + i * stride;
    epilogue.round_scaled(rank, lora_scale(p), row, q.rows + (part.first + i) * rank);
    const float weight = p == Projection::down ? weight_[static_cast<std::size_t>(part.first + i)] : 1.0f;
    for (int j = 0; j < rank; ++j) row[j] *= weight;
  }
  epilogue.transpose(product, stride, count, rank, transposed, count);
  bf16_t* stored = q.transposed + rank * block.first + (part.first - block.first);
  for (int j = 0; j < rank; ++j)
    epilogue.round_scaled(count, lora_scale(p), transposed + j * count, stored + j * block.count);
}

std::vector<Backward::LoraJob> Backward::lora_jobs() const {
  std::vector<LoraJob> jobs;
  const auto cut = [&](int expert, Projection p, bool of_b, index_t n) {
    const GemmKernels& gemm = kernels().gemm;
    const index_t parts = slices(n, gemm.nr, kBlockRows * gemm.element_bytes);
    for (index_t part = 0; part < parts; ++part)
      jobs.push_back({expert, p, of_b, split(n, parts, part, gemm.nr)});
  };
  for (int e = 0; e < experts_.num_experts; ++e)
    for (const Projection p : projections) {
      const LoraPair& lora = inputs_.of(p);
      if (gradients_.lora_a[index_of(p)]) cut(e, p, false, lora.a.cols);
      if (gradients_.lora_b[index_of(p)]) cut(e, p, true, lora.b.rows);
    }
  return jobs;
}

void Backward::lora(const LoraJob& job, Arena& scratch) const {
  const std::size_t p = index_of(job.projection);
  const index_t rank = inputs_.of(job.projection).rank(), width = job.slice.size();
  const index_t stride = result_stride(kernels(), width);
  auto* grad = scratch.take<float>(rank * stride);
  std::fill_n(grad, rank * stride, 0.0f);
  for (const Block block : blocks_of(job.expert)) {
    const Arena::Frame frame(scratch);
    const bf16_t* low_rank = job.of_b ? low_rank_[p] : grad_low_rank_[p].transposed;
    const Rows rows = job.of_b ? grad_output(job.projection, block, job.slice)
                               : lora_input(job.projection, block, job.slice, scratch);
    const Term term{pack_a(kernels(), {low_rank_of(low_rank, rank, block, block)}, scratch),
                    pack_b_rows(kernels(), rows, scratch)};
    multiply(kernels(), {&term, 1}, grad, /*accumulate=*/true);
  }
  if (!job.of_b) {
    const index_t in = inputs_.of(job.projection).a.cols, first = job.expert * rank * in + job.slice.begin;
    for (index_t i = 0; i < rank; ++i) store(grad + i * stride, width, gradients_.lora_a[p], first + i * in);
  } else {
    auto* transposed = scratch.take<float>(width * rank);
    kernels().epilogue.transpose(grad, stride, static_cast<int>(rank), static_cast<int>(width), transposed,
                                 rank);
    const index_t out = inputs_.of(job.projection).b.rows;
    store(transposed, width * rank, gradients_.lora_b[p], (job.expert * out + job.slice.begin) * rank);
  }
}

}  // namespace kt
