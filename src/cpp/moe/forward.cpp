#include "moe/pass.h"

namespace kt {

namespace {

class Forward : Pass {
 public:
  using Pass::Pass;

  void run(const Saved& saved, const Result& out) {
    hidden_ = memory().take<bf16_t>(routing_.routes() * experts_.intermediate);
    for (const Projection p : kGateUp)
      low_rank_[index_of(p)] = saved ? saved.low_rank[index_of(p)] : take_low_rank(p);
    low_rank_[index_of(Projection::down)] = take_low_rank(Projection::down);
    weighted_low_rank_ = saved.low_rank[index_of(Projection::down)];
    add_gate_up(saved);
    add_hidden();
    add_down(out);
    tasks_.run(lease_);
  }

 private:
  // Packs h, and computes Pd = s h Ad'.
  void add_hidden() {
    const index_t n = experts_.intermediate, rank = inputs_.of(Projection::down).rank();
    packed_.resize(blocks_.size());
    for (const Block block : blocks_) {
      char* rows = memory().take<char>(packed_b_bytes(kernels(), block.count, n));
      char* low_rank = memory().take<char>(packed_b_bytes(kernels(), block.count, rank));
      packed_done_.push_back(tasks_.add(1, [=, this](index_t, Arena& scratch) {
        tasks_.wait(gate_up_done_[block.index]);
        ForwardInput& in = packed_[block.index];
        if (!few(block)) in.rows = pack_b_cols_into(rows, kernels(), input(Projection::down, block, {0, n}));
        if (rank == 0) return;
        project_a(Projection::down, block, &in.rows, scratch);
        if (few(block)) return;
        constexpr std::size_t kDown = index_of(Projection::down);
        in.low_rank[kDown] =
            pack_b_rows_into(low_rank, kernels(), {low_rank_of(low_rank_[kDown], rank, block)});
      }));
    }
  }

  // out[token] += weight * (h W' + P B').
  void add_down(const Result& out) {
    const GemmKernels& gemm = kernels().gemm;
    const auto product = [this](Block block, Range slice, float* rows, index_t stride, Arena& scratch) {
      // In strips, each fetching the next one's weights.
      const index_t width = slice.size(), strips = ceil_div(width, 4 * kernels().gemm.mr);
      for_run(0, strips, width, strips, kernels().gemm.mr, [&](Range strip, Range next) {
        const Arena::Frame frame(scratch);
        const auto shifted = [&](Range r) { return Range{slice.begin + r.begin, slice.begin + r.end}; };
        const ForwardWeights weights = forward_weights(Projection::down, block, shifted(strip), scratch);
        const MatView soon = weight_rows(Projection::down, block.expert, shifted(next)).matrix;
        for_tiles(block, [&](Block part) {
          multiply_forward(Projection::down, weights, packed_[block.index], part,
                           part.first == block.first ? soon : MatView{},
                           rows + within(part).begin * stride + strip.begin, stride, scratch);
        });
      });
    };
    add_sum(out, /*weighted=*/true, gemm.mr, experts_.intermediate * gemm.element_bytes, packed_done_,
            product);
  }

  std::vector<ForwardInput> packed_;  // a block each
  std::vector<const Group*> packed_done_;
};

}  // namespace

void forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs, const Saved& saved,
             Result out) {
  Forward(runtime, experts, inputs).run(saved, out);
}

}  // namespace kt
