#include "moe/pass.h"

namespace kt {

namespace {

class Forward : Pass {
 public:
  Forward(Runtime& runtime, const ExpertWeights& experts, const LayerInputs& inputs)
      : Pass(runtime, experts, inputs, Direction::forward) {}

  void run(const Saved& saved, const Result& out) {
    constexpr Projection down = Projection::down;
    hidden_ = take_inner();
    for (const Projection p : kGateUp)
      low_rank_[index_of(p)] = saved ? cut_low_rank(p, saved.low_rank[index_of(p)]) : take_low_rank(p);
    low_rank_[index_of(down)] = take_low_rank(down);
    weighted_low_rank_ = cut_low_rank(down, saved.low_rank[index_of(down)]);
    saved_gate_ = cut_inner(saved.gate), saved_up_ = cut_inner(saved.up);
    add_gate_up();
    add_hidden();
    add_down(out);
    run_tasks();
    for (int e = 0; experts_.routed != nullptr && e < experts_.num_experts; ++e)
      experts_.routed[e] += routing_.count(e);
  }

 private:
  // Packs h, and computes Pd = s h Ad'.
  void add_hidden() {
    constexpr Projection down = Projection::down;
    packed_.resize(blocks_.size());
    std::vector<char*> memory;
    for (const Block block : blocks_)
      memory.push_back(this->memory(block).take<char>(forward_input_bytes(kDown, block.count, inner(block))));
    add_reduced(Stage::hidden, gate_up_done_,
                {[this](Block block) { return product_floats(down, block); },
                 [=, this](Block block, float* product, Arena& scratch) {
                   ForwardInput& in = packed_[block.index];
                   pack_input(down, block, memory[block.index], in);
                   if (inputs_.of(down)) multiply_a(down, block, in.rows, product, scratch);
                 },
                 [=, this](Block block, float* product, Arena&) {
                   if (!inputs_.of(down)) return;
                   keep_low_rank(down, block, product);
                   char* behind = memory[block.index] + packed_b_bytes(kernels(), block.count, inner(block));
                   pack_low_rank(down, block, behind, packed_[block.index]);
                 }},
                packed_done_);
  }

  // out[token] += weight * (h W' + P B').
  void add_down(const Result& out) {
    const GemmKernels& gemm = kernels().gemm;
    add_sum(
        Stage::down, out, /*weighted=*/true, gemm.mr, gemm.element_bytes, packed_done_,
        [this](const Siblings& blocks, Range strip, Range next, float* rows, index_t stride, Arena& scratch) {
          std::vector<ForwardWeights> weights;
          for (const Block block : blocks)
            weights.push_back(
                forward_weights(Projection::down, block, packed_[block.index], strip, next, scratch));
          for_tiles(blocks.front(), [&](Block part) {
            multiply_forward(Projection::down, weights, part, rows + within(part).begin * stride, stride,
                             scratch);
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
