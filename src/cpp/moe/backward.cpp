#include <algorithm>

#include "moe/pass.h"

namespace kt {

namespace {

class Backward : Pass {
 public:
  Backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const MatView& grad_out,
           const LayerGradients& gradients)
      : Pass(runtime, experts, inputs), grad_out_(grad_out), gradients_(gradients) {}

  void run(SavedGateUp saved) {
    const index_t routes = routing_.routes(), n = experts_.intermediate;
    hidden_ = memory().take<bf16_t>(routes * n);
    grad_gate_up_ = {memory().take<bf16_t>(routes * n), memory().take<bf16_t>(routes * n)};
    for (const Projection p : projections) {
      const std::size_t i = index_of(p);
      low_rank_[i] = take_low_rank(p);
      grad_low_rank_[i] = {take_low_rank(p), take_low_rank(p)};
    }
    project_a({Projection::gate, Projection::up});
    if (saved.gate == nullptr) {
      saved = {memory().take<bf16_t>(routes * n), memory().take<bf16_t>(routes * n)};
      gate_up(saved);
    }
    project_grad_b({Projection::down});
    down(saved);
    project_a({Projection::down}, /*weighted=*/true);
    project_grad_b({Projection::gate, Projection::up});
    input_and_lora();
  }

 private:
  // Q = s dOutput B of a route: by rows for the gradient of the input, transposed for that of A. The routing
  // weight of the down projection belongs in the second alone: dh' is wanted without it.
  struct LowRankGradient {
    bf16_t *rows = nullptr, *transposed = nullptr;
  };

  // The gradient of a projection's output, rows of a block.
  Rows grad_output(Projection p, Block block, Range cols) const {
    if (p == Projection::down) return by_token(grad_out_, block, cols);
    return by_route(grad_gate_up_[index_of(p)], experts_.intermediate, block, cols);
  }

  // The input of a projection's LoRA A, rows of a block.
  Rows lora_input(Projection p, Block block, Range cols, Arena& scratch) const {
    const Rows rows = p == Projection::down ? by_route(hidden_, experts_.intermediate, block, cols)
                                            : by_token(inputs_.hidden_states, block, cols);
    return dropped(rows, p, block, cols, scratch);
  }

  index_t rows_per_part() const { return 4 * kernels().gemm.mr; }

  void project_grad_b(std::initializer_list<Projection> targets) {
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

  void store_low_rank(Projection p, Block block, Block part, float* product, index_t stride,
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

  // dh' = dY Wd + Q Ad, then dG, dU, h and <dh', h> from it and the saved G, U.
  void down(SavedGateUp saved) {
    const index_t n = experts_.intermediate, h = experts_.hidden, routes = routing_.routes();
    const GemmKernels& gemm = kernels().gemm;
    const index_t parts = slices(n, gemm.nr, h * gemm.element_bytes);
    auto* dots = memory().take<float>(parts * routes);
    std::fill_n(dots, parts * routes, 0.0f);
    lease_.parallel_for(std::ssize(blocks_) * parts, [&](index_t task, Arena& scratch) {
      const Block block = blocks_[static_cast<std::size_t>(task / parts)];
      const Range slice = split(n, parts, task % parts, gemm.nr);
      if (slice.size() == 0) return;
      const Stack& weights = experts_.of(Projection::down);
      const PackedB base =
          pack_b_rows(kernels(), {weights[block.expert].block(0, slice.begin, h, slice.size())}, scratch);
      const std::vector<LoraA> lora = pack_lora_a({Projection::down}, block.expert, slice, scratch);
      const index_t stride = result_stride(kernels(), slice.size());
      auto* grad = scratch.take<float>(rows_per_part() * stride);
      for_parts(block, rows_per_part(), [&](Block part) {
        const Arena::Frame frame(scratch);
        const Term term{pack_a(kernels(), by_token(grad_out_, part, {0, h}), scratch), base};
        input_gradient({&term, 1}, lora, part, slice, grad, scratch);
        for (index_t i = 0; i < part.count; ++i) {
          const index_t route = part.first + i, place = route * n + slice.begin;
          dots[task % parts * routes + route] =
              kernels_of(kernels(), experts_.activation)
                  .backward(static_cast<int>(slice.size()), grad + i * stride,
                            weight_[static_cast<std::size_t>(route)], saved.gate + place, saved.up + place,
                            grad_gate_up_[0] + place, grad_gate_up_[1] + place, hidden_ + place);
        }
      });
    });
    if (gradients_.topk_weights != nullptr) sum_dots(dots, parts);
  }

  // The gradient of a routing weight, its slices added in order; 0 where there is no route.
  void sum_dots(const float* dots, index_t parts) const {
    std::fill_n(gradients_.topk_weights, inputs_.topk_weights.rows * inputs_.topk_weights.cols, 0.0f);
    for (index_t part = 0; part < parts; ++part)
      for (index_t r = 0; r < routing_.routes(); ++r)
        gradients_.topk_weights[routing_.slot[static_cast<std::size_t>(r)]] +=
            dots[part * routing_.routes() + r];
  }

  // A of a projection with LoRA, a slice of its columns.
  struct LoraA {
    Projection projection;
    PackedB packed;
  };

  std::vector<LoraA> pack_lora_a(std::initializer_list<Projection> targets, int expert, Range slice,
                                 Arena& scratch) const {
    std::vector<LoraA> packed;
    for (const Projection p : targets)
      if (const LoraPair& lora = inputs_.of(p); lora)
        packed.push_back(
            {p, pack_b_rows(kernels(), {lora.a[expert].block(0, slice.begin, lora.rank(), slice.size())},
                            scratch)});
    return packed;
  }

  // The gradient of some projections' input, columns `slice`: the base terms and Q A of each LoRA, one fp32
  // sum.
  void input_gradient(std::span<const Term> base, std::span<const LoraA> loras, Block part, Range slice,
                      float* result, Arena& scratch) const {
    std::vector<Term> terms(base.begin(), base.end());
    for (const LoraA& a : loras) {
      const index_t rank = inputs_.of(a.projection).rank();
      const Rows q = by_route(grad_low_rank_[index_of(a.projection)].rows, rank, part, {0, rank});
      terms.push_back({pack_a(kernels(), q, scratch), a.packed});
    }
    if (!inputs_.dropout.active()) return multiply(kernels(), terms, result);

    multiply(kernels(), base, result);
    const index_t stride = result_stride(kernels(), slice.size());
    auto* product = scratch.take<float>(part.count * stride);
    for (std::size_t i = 0; i < loras.size(); ++i) {  // what was dropped gets no gradient
      multiply(kernels(), {&terms[base.size() + i], 1}, product);
      for (index_t row = 0; row < part.count; ++row) {
        const std::int32_t slot = routing_.slot[static_cast<std::size_t>(part.first + row)];
        drop(inputs_.dropout, loras[i].projection, slot, slice.begin, slice.size(), product + row * stride);
        kernels().epilogue.add_scaled(static_cast<int>(slice.size()), 1.0f, product + row * stride,
                                      result + row * stride);
      }
    }
  }

  // A gradient of LoRA A or B of one expert, some of its columns (A) or rows (B).
  struct LoraJob {
    int expert;
    Projection projection;
    bool of_b;
    Range slice;
  };

  // The two last products of backward do not wait for each other: one loop over both kinds of task.
  void input_and_lora() {
    const GemmKernels& gemm = kernels().gemm;
    const index_t h = experts_.hidden;
    const index_t parts = gradients_.hidden_states
                              ? slices_per_thread(h, gemm.nr, 2 * experts_.intermediate * gemm.element_bytes)
                              : 0;
    const std::vector<LoraJob> jobs = lora_jobs();
    lease_.parallel_for(parts + std::ssize(jobs), [&](index_t task, Arena& scratch) {
      if (task < parts)
        hidden_states(split(h, parts, task, gemm.nr), scratch);
      else
        lora(jobs[static_cast<std::size_t>(task - parts)], scratch);
    });
  }

  // dX[token] += dG Wg + dU Wu + Qg Ag + Qu Au.
  void hidden_states(Range slice, Arena& scratch) const {
    sum_over_experts(slice, gradients_.hidden_states, scratch,
                     [&](int expert, float* sum) { add_expert(expert, slice, sum, scratch); });
  }

  void add_expert(int expert, Range slice, float* sum, Arena& scratch) const {
    const index_t n = experts_.intermediate, width = slice.size(), stride = result_stride(kernels(), width);
    std::array<PackedB, 2> weights;
    for (const Projection p : {Projection::gate, Projection::up})
      weights[index_of(p)] =
          pack_b_rows(kernels(), {experts_.of(p)[expert].block(0, slice.begin, n, width)}, scratch);
    const std::vector<LoraA> loras = pack_lora_a({Projection::gate, Projection::up}, expert, slice, scratch);
    auto* grad = scratch.take<float>(rows_per_part() * stride);

    for (const Block block : blocks_of(expert))
      for_parts(block, rows_per_part(), [&](Block part) {
        const Arena::Frame part_frame(scratch);
        std::array<Term, 2> terms;
        for (const Projection p : {Projection::gate, Projection::up})
          terms[index_of(p)] = {pack_a(kernels(), grad_output(p, part, {0, n}), scratch),
                                weights[index_of(p)]};
        input_gradient(terms, loras, part, slice, grad, scratch);
        for (index_t row = 0; row < part.count; ++row) {
          const std::int32_t token = routing_.token[static_cast<std::size_t>(part.first + row)];
          kernels().epilogue.add_scaled(static_cast<int>(width), 1.0f, grad + row * stride,
                                        sum + token * width);
        }
      });
  }

  std::vector<LoraJob> lora_jobs() const {
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

  // dA = Q' X and dB' = P' dOutput, summed over the expert's routes in order; zero for an idle expert.
  void lora(const LoraJob& job, Arena& scratch) {
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
      for (index_t i = 0; i < rank; ++i)
        store(grad + i * stride, width, gradients_.lora_a[p], first + i * in);
    } else {
      auto* transposed = scratch.take<float>(width * rank);
      kernels().epilogue.transpose(grad, stride, static_cast<int>(rank), static_cast<int>(width), transposed,
                                   rank);
      const index_t out = inputs_.of(job.projection).b.rows;
      store(transposed, width * rank, gradients_.lora_b[p], (job.expert * out + job.slice.begin) * rank);
    }
  }

  MatView grad_out_;
  const LayerGradients& gradients_;
  std::array<bf16_t*, 2> grad_gate_up_{};
  std::array<LowRankGradient, 3> grad_low_rank_{};
};

}  // namespace

void backward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, SavedGateUp saved,
              const MatView& grad_out, const LayerGradients& gradients) {
  Backward(runtime, experts, inputs, grad_out, gradients).run(saved);
}

}  // namespace kt
