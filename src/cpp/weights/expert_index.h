// Answers (layer, expert, projection) with a view of the bytes in the file, from the tensors' names alone.
// Decodes nothing.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/projection.h"
#include "base/view.h"
#include "weights/checkpoint.h"
#include "weights/expert_names.h"

namespace kt {

struct LayerInfo {
  int num_experts;
  index_t hidden_size, intermediate_size;
  DType dtype;                   // bf16, f16 or f32
  std::string_view stored_type;  // the same as the file names it: "BF16"
  std::string_view layout;       // "per-expert" or "fused"
  std::size_t nbytes;            // of all experts, as stored
};

class ExpertIndex {
 public:
  explicit ExpertIndex(std::shared_ptr<const Checkpoint> checkpoint);

  const Checkpoint& checkpoint() const { return *checkpoint_; }

  // Layers that hold experts, ascending, whether or not we can read their format.
  std::vector<int> layers() const;

  // Checks every tensor of the layer. Throws ValueError: no such layer, an expert that is missing, shapes or
  // dtypes that disagree, a format or dtype that is not supported.
  LayerInfo layer(int layer) const;

  // gate and up: [I, H]; down: [H, I]. A view into the mapped file, valid as long as the checkpoint is.
  // Checks the one tensor against the layer's first expert; throws as `layer` does.
  MatView expert(int layer, int expert, Projection p) const;

 private:
  // The experts under one root, e.g. "model.layers.3.mlp".
  struct Home {
    const Scheme* scheme = nullptr;
    std::string root;
    int experts = 0;      // one more than the highest number in a name; 0 when names carry none
    std::string rival;    // a tensor of a second scheme
    std::string foreign;  // a tensor among the experts that no scheme knows
  };
  using Layer = std::map<std::string, Home, std::less<>>;  // by root

  void add(std::string_view name);
  std::string where() const;  // opens every message
  const Home& home(int layer) const;
  LayerInfo sizes(int layer, const Home& home) const;  // nbytes not yet counted
  MatView stored(int layer, const Home& home, const LayerInfo& info, int expert, Projection p) const;

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::map<int, Layer> layers_;
};

}  // namespace kt
