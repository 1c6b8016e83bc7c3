#include "moe/pass.h"

namespace kt {

namespace {

class Forward : Pass {
 public:
  using Pass::Pass;

  void run(SavedGateUp saved, const Result& out) {
    hidden_ = memory().take<bf16_t>(routing_.routes() * experts_.intermediate);
    for (const Projection p : projections) low_rank_[index_of(p)] = take_low_rank(p);
    project_a({Projection::gate, Projection::up});
    gate_up(saved);
    project_a({Projection::down});
    down(out);
  }

 private:
  // out[token] += weight * (h W' + P B').
  void down(const Result& out) {
    const index_t h = experts_.hidden;
    const GemmKernels& gemm = kernels().gemm;
    const index_t parts = slices_per_thread(h, gemm.mr, experts_.intermediate * gemm.element_bytes);
    lease_.parallel_for(parts, [&](index_t task, Arena& scratch) {
      const Range slice = split(h, parts, task, gemm.mr);
      sum_over_experts(slice, out, scratch,
                       [&](int expert, float* sum) { add_expert(expert, slice, sum, scratch); });
    });
  }

  void add_expert(int expert, Range slice, float* sum, Arena& scratch) const {
    const index_t width = slice.size(), n = experts_.intermediate, part_rows = kernels().gemm.nr;
    const LoraPair& lora = inputs_.of(Projection::down);
    const PackedA weights =
        pack_a(kernels(), {experts_.of(Projection::down)[expert].block(slice.begin, 0, width, n)}, scratch);
    PackedA lora_b;
    if (lora) lora_b = pack_a(kernels(), {lora.b[expert].block(slice.begin, 0, width, lora.rank())}, scratch);
    auto* transposed = scratch.take<float>(width * part_rows);
    auto* y = scratch.take<float>(part_rows * width);

    for (const Block block : blocks_of(expert)) {
      for_parts(block, part_rows, [&](Block part) {
        const Arena::Frame part_frame(scratch);
        std::array<Term, 2> terms{
            Term{weights, pack_b_cols(kernels(), by_route(hidden_, n, part, {0, n}), scratch)}, Term{}};
        if (lora) {
          const MatView p = low_rank_of(low_rank_[index_of(Projection::down)], lora.rank(), block, part);
          terms[1] = {lora_b, pack_b_rows(kernels(), {p}, scratch)};
        }
        multiply(kernels(), {terms.data(), lora ? 2u : 1u}, transposed);
        kernels().epilogue.transpose(transposed, part_rows, static_cast<int>(width),
                                     static_cast<int>(part.count), y, width);
        for (index_t row = 0; row < part.count; ++row) {
          const auto r = static_cast<std::size_t>(part.first + row);
          kernels().epilogue.add_scaled(static_cast<int>(width), weight_[r], y + row * width,
                                        sum + routing_.token[r] * width);
        }
      });
    }
  }
};

}  // namespace

void forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, SavedGateUp saved,
             Result out) {
  Forward(runtime, experts, inputs).run(saved, out);
}

}  // namespace kt
