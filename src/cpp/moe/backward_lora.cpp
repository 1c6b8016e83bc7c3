// The part of backward that only LoRA needs: Q = s dOutput B, and the gradients of A and B.
#include <emmintrin.h>

#include <algorithm>
#include <cstring>
#include <span>

#include "moe/backward.h"

namespace kt {

namespace {

// Past the caches, so that no line is fetched only to be overwritten.
void stream_zeros(char* to, std::size_t bytes) {
  constexpr std::size_t kVector = sizeof(__m128i);
  const std::size_t head = std::min(bytes, -reinterpret_cast<std::uintptr_t>(to) % kVector);
  std::memset(to, 0, head);
  std::size_t i = head;
  for (; i + kVector <= bytes; i += kVector)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
  std::memset(to + i, 0, bytes - i);
  _mm_sfence();
}

}  // namespace

void Backward::project_grad_b(Projection p, Block block, PackedA packed, Arena& scratch) {
  const Arena::Frame frame(scratch);
  const LoraPair& lora = inputs_.of(p);
  const index_t rank = lora.rank(), stride = result_stride(kernels(), rank), part_rows = rows_per_part();
  const Rows lora_b{lora.b[block.expert]};
  const PackedB b = few(block) ? PackedB{} : pack_b_rows(kernels(), lora_b, scratch);
  auto* product = scratch.take<float>(part_rows * stride);
  auto* transposed = scratch.take<float>(rank * part_rows);
  for_parts(block, part_rows, [&](Block part) {
    if (few(block)) {
      multiply_few(kernels(), grad_output(p, part, {0, lora.b.rows}), lora_b, product, stride,
                   /*accumulate=*/false, scratch);
    } else {
      const Term term{rows_of(kernels(), packed, within(part)), b};
      multiply(kernels(), {&term, 1}, product, stride);
    }
    store_low_rank(p, part, product, stride, transposed);
  });
}

void Backward::store_low_rank(Projection p, Block part, float* product, index_t stride, float* transposed) {
  const EpilogueKernels& epilogue = kernels().epilogue;
  const LowRankGradient& q = grad_low_rank_[index_of(p)];
  const int rank = static_cast<int>(inputs_.of(p).rank()), count = static_cast<int>(part.count);
  for (index_t i = 0; i < part.count; ++i) {
    float* row = product + i * stride;
    epilogue.round_scaled(rank, lora_scale(p), row, q.rows + (part.first + i) * rank);
    const float factor = p == Projection::down ? weight(part.first + i) : 1.0f;
    for (int j = 0; j < rank; ++j) row[j] *= factor;
  }
  epilogue.transpose(product, stride, count, rank, transposed, count);
  const Block& whole = blocks_[part.index];
  bf16_t* stored = q.transposed + rank * whole.first + within(part).begin;
  for (int j = 0; j < rank; ++j)
    epilogue.round_scaled(count, lora_scale(p), transposed + j * count, stored + j * whole.count);
}

void Backward::add_lora() {
  std::vector<LoraJob> jobs = lora_jobs();
  const auto count = std::ssize(jobs);
  tasks_.add(count, [this, jobs = std::move(jobs)](index_t job, Arena& scratch) {
    lora(jobs[static_cast<std::size_t>(job)], scratch);
  });
  tasks_.add(experts_.num_experts, [this](index_t expert, Arena&) {
    if (routing_.count(static_cast<int>(expert)) == 0) clear_lora(expert);
  });
}

std::vector<Backward::LoraJob> Backward::lora_jobs() const {
  std::vector<LoraJob> jobs;
  const auto cut = [&](int expert, Projection p, bool of_b, index_t n) {
    const GemmKernels& gemm = kernels().gemm;
    const Slices slices = this->slices(n, gemm.nr, kBlockRows * gemm.element_bytes);
    for (index_t i = 0; i < slices.count; ++i) jobs.push_back({expert, p, of_b, slices[i]});
  };
  for (const int e : routing_.experts)
    for (const Projection p : projections) {
      const LoraPair& lora = inputs_.of(p);
      if (gradients_.lora_a[index_of(p)]) cut(e, p, false, lora.a.cols);
      if (gradients_.lora_b[index_of(p)]) cut(e, p, true, lora.b.rows);
    }
  return jobs;
}

void Backward::clear_lora(index_t expert) const {
  const auto clear = [expert](const Result& gradient, const Stack& stack) {
    if (!gradient) return;
    const index_t bytes = stack.rows * stack.cols * static_cast<index_t>(size_of(gradient.dtype));
    stream_zeros(static_cast<char*>(gradient.data) + expert * bytes, static_cast<std::size_t>(bytes));
  };
  for (const Projection p : projections) {
    clear(gradients_.lora_a[index_of(p)], inputs_.of(p).a);
    clear(gradients_.lora_b[index_of(p)], inputs_.of(p).b);
  }
}

void Backward::lora(const LoraJob& job, Arena& scratch) const {
  const std::size_t p = index_of(job.projection);
  const index_t rank = inputs_.of(job.projection).rank(), width = job.slice.size();
  const index_t stride = result_stride(kernels(), width);
  const bf16_t* low_rank = job.of_b ? output_low_rank(job.projection) : grad_low_rank_[p].transposed;
  auto* grad = scratch.take<float>(rank * stride);
  bool accumulate = false;
  // Two bounds, because clang 14 does not compile libstdc++'s std::ranges::subrange.
  const auto begin = std::ranges::lower_bound(blocks_, job.expert, {}, &Block::expert);
  const auto end = std::ranges::upper_bound(blocks_, job.expert, {}, &Block::expert);
  for (const Block& block : std::span(begin, end)) {
    tasks_.wait(gradients_done_[block.index]);
    const Arena::Frame frame(scratch);
    const Rows rows = job.of_b ? grad_output(job.projection, block, job.slice)
                               : lora_input(job.projection, block, job.slice, scratch);
    const Term term{pack_a(kernels(), {low_rank_of(low_rank, rank, block)}, scratch),
                    pack_b_rows(kernels(), rows, scratch)};
    multiply(kernels(), {&term, 1}, grad, stride, accumulate);
    accumulate = true;
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
