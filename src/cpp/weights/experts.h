// The frozen experts of one layer in memory of their own: a dense bf16 copy, natural order, on huge pages.
// Immutable once made; refuses anything that is not bf16, fp16 or fp32.
#pragma once

#include <functional>
#include <memory>

#include "base/arena.h"
#include "moe/layer.h"
#include "weights/expert_index.h"

namespace kt {

class Experts {
 public:
  // One [rows, cols] matrix of `source` an expert and projection; read by several threads at once.
  using Source = std::function<MatView(int expert, Projection p)>;

  Experts(std::shared_ptr<Runtime> runtime, int num_experts, index_t hidden, index_t intermediate,
          Activation activation, const Source& source);

  static std::shared_ptr<Experts> from_index(std::shared_ptr<Runtime> runtime, const ExpertIndex& index,
                                             int layer, Activation activation);

  const ExpertWeights& weights() const { return weights_; }
  Runtime& runtime() const { return *runtime_; }
  std::size_t nbytes() const { return memory_.size(); }

 private:
  std::shared_ptr<Runtime> runtime_;
  ExpertWeights weights_;
  Buffer memory_;
};

}  // namespace kt
