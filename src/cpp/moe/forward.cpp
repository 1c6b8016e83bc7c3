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
    for (int e = 0; experts_.routed != nullptr && e < experts_.num_experts; ++e)
      experts_.routed[e] += routing_.count(e);
  }

 private:
  // Packs h, and computes Pd = s h Ad'.
  void add_hidden() {
    packed_.resize(blocks_.size());
    for (const Block block : blocks_) {
      char* memory = this->memory().take<char>(forward_input_bytes(kDown, block.count));
      packed_done_.push_back(tasks_.add(1, [=, this](index_t, Arena& scratch) {
        tasks_.wait(gate_up_done_[block.index]);
        pack_forward_input(kDown, block, memory, packed_[block.index], scratch);
      }));
    }
  }

  // out[token] += weight * (h W' + P B').
  void add_down(const Result& out) {
    const GemmKernels& gemm = kernels().gemm;
    add_sum(out, /*weighted=*/true, gemm.mr, experts_.intermediate * gemm.element_bytes, packed_done_,
            [this](Block block, Range strip, Range next, float* rows, index_t stride, Arena& scratch) {
              const ForwardWeights weights = forward_weights(Projection::down, block, strip, next, scratch);
              for_tiles(block, [&](Block part) {
                multiply_forward(Projection::down, weights, packed_[block.index], part,
                                 rows + within(part).begin * stride, stride, scratch);
              });
            });
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
