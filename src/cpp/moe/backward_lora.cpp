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

void Backward::multiply_b(Projection p, Block block, float* product, Arena& scratch) const {
  const Arena::Frame frame(scratch);
  const Rows lora_b{this->lora_b(p, block)};
  const index_t stride = result_stride(kernels(), inputs_.of(p).rank());
  const PackedB b = few(block) ? PackedB{} : pack_b_rows(kernels(), lora_b, scratch);
  const PackedA packed = grad_inputs_[index_of(p)][block.index].rows;
  Span span(recorder(scratch), Stage::lora_q);
  span.count({2 * block.count * inputs_.of(p).rank() * rows(p, block), 0, 0});
  for_parts(block, rows_per_part(), [&](Block part) {
    float* place = product + within(part).begin * stride;
    if (few(block)) {
      multiply_few(kernels(), grad_output(p, part, {0, rows(p, block)}), lora_b, place, stride,
                   /*accumulate=*/false, scratch);
    } else {
      const Term term{rows_of(kernels(), packed, within(part)), b};
      multiply(kernels(), {&term, 1}, place, stride);
    }
  });
}

void Backward::keep_grad_low_rank(Projection p, Block block, float* product, Arena& scratch) {
  const Arena::Frame frame(scratch);
  const EpilogueKernels& epilogue = kernels().epilogue;
  const LowRankGradient& q = grad_low_rank_[index_of(p)];
  const index_t stride = result_stride(kernels(), inputs_.of(p).rank());
  const int rank = static_cast<int>(inputs_.of(p).rank()), count = static_cast<int>(block.count);
  for (index_t i = 0; i < count; ++i) {
    float* row = product + i * stride;
    epilogue.round_scaled(rank, lora_scale(p), row, q.rows[block.index] + i * rank);
    const float factor = p == Projection::down ? weight(block.first + i) : 1.0f;
    for (int j = 0; j < rank; ++j) row[j] *= factor;
  }
  auto* transposed = scratch.take<float>(rank * block.count);
  epilogue.transpose(product, stride, count, rank, transposed, count);
  for (int j = 0; j < rank; ++j)
    epilogue.round_scaled(count, lora_scale(p), transposed + j * count,
                          q.transposed[block.index] + j * count);
}

void Backward::add_lora() {
  for (const int e : routing_.experts)
    for (const Projection p : projections)
      for (const bool of_b : {false, true})
        if ((of_b ? gradients_.lora_b : gradients_.lora_a)[index_of(p)]) add_lora_jobs(e, p, of_b);
  if (!gradients_.clear_idle) return;
  tasks_.add(Stage::clear, 0, experts_.num_experts, [this](index_t expert, Arena&) {
    if (routing_.count(static_cast<int>(expert)) == 0) clear_lora(expert);
  });
}

void Backward::add_lora_jobs(int expert, Projection p, bool of_b) {
  const GemmKernels& gemm = kernels().gemm;
  const bool by_shard = of_b == (p != Projection::down);
  const LoraPair& lora = inputs_.of(p);
  // Two bounds, because clang 14 does not compile libstdc++'s std::ranges::subrange.
  const auto begin = std::ranges::lower_bound(blocks_, expert, {}, &Block::expert);
  const auto end = std::ranges::upper_bound(blocks_, expert, {}, &Block::expert);
  for (std::size_t shard = 0; shard < (by_shard ? shards_.size() : 1); ++shard) {
    LoraJob job{expert, p, of_b, {}, {}};
    for (const Block& block : std::span(begin, end))
      if (by_shard ? block.shard == shard : at_home(block)) job.blocks.push_back(block.index);
    const index_t n = by_shard ? shards_[shard].inner.size() : of_b ? lora.b.rows : lora.a.cols;
    const Slices slices = this->slices(n, gemm.nr, kBlockRows * gemm.element_bytes);
    tasks_.add(label(Stage::lora_grad, blocks_[job.blocks.front()]), blocks_[job.blocks.front()].team,
               slices.count, [=, this](index_t i, Arena& scratch) {
                 LoraJob mine = job;
                 mine.slice = slices[i];
                 if (mine.slice.size() > 0) this->lora(mine, scratch);
               });
  }
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
  const Projection p = job.projection;
  const std::size_t i = index_of(p);
  const index_t rank = inputs_.of(p).rank(), width = job.slice.size();
  const index_t stride = result_stride(kernels(), width);
  const ByBlock& low_rank = job.of_b ? output_low_rank(p) : grad_low_rank_[i].transposed;
  auto* grad = scratch.take<float>(rank * stride);
  bool accumulate = false;
  for (const std::size_t b : job.blocks) {
    const Block block = blocks_[b];
    tasks_.wait(gradients_done_[b], scratch);
    count(scratch, {2 * block.count * rank * width, 0, 0});
    const Arena::Frame frame(scratch);
    const Rows rows = job.of_b ? grad_output(p, block, job.slice) : lora_input(p, block, job.slice, scratch);
    const Term term{pack_a(kernels(), {low_rank_of(low_rank, rank, block)}, scratch),
                    pack_b_rows(kernels(), rows, scratch)};
    multiply(kernels(), {&term, 1}, grad, stride, accumulate);
    accumulate = true;
  }
  // A [r, in] and B [out, r], of which this is `first` and what follows.
  const Block block = blocks_[job.blocks.front()];
  const Stack& a = inputs_.of(p).a;
  const Stack& b = inputs_.of(p).b;
  if (!job.of_b) {
    const index_t first = job.expert * rank * a.cols + first_col(p, block) + job.slice.begin;
    for (index_t j = 0; j < rank; ++j)
      store(grad + j * stride, width, gradients_.lora_a[i], first + j * a.cols);
  } else {
    auto* transposed = scratch.take<float>(width * rank);
    kernels().epilogue.transpose(grad, stride, static_cast<int>(rank), static_cast<int>(width), transposed,
                                 rank);
    const index_t first = job.expert * b.rows + first_row(p, block) + job.slice.begin;
    store(transposed, width * rank, gradients_.lora_b[i], first * rank);
  }
}

}  // namespace kt
