// Which layers of a checkpoint hold experts, and where, from the tensors' names. Opens a layer to be read.
#pragma once

#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include "base/per_process.h"
#include "weights/checkpoint.h"
#include "weights/layer_source.h"
#include "weights/layer_tensors.h"

namespace kt {

class ExpertIndex {
 public:
  explicit ExpertIndex(std::shared_ptr<const Checkpoint> checkpoint);

  const Checkpoint& checkpoint() const { return *checkpoint_; }

  // Layers that hold experts, ascending, whether or not we can read their format.
  std::vector<int> layers() const;

  // Checks every tensor of the layer. Throws ValueError: no such layer, an expert that is missing, shapes or
  // types that disagree, a format that is not supported.
  // Thread-safe; opens a layer once.
  std::shared_ptr<const LayerSource> open(int layer) const;
  LayerInfo layer(int layer) const { return open(layer)->info(); }

 private:
  // The experts under one root, e.g. "model.layers.3.mlp".
  struct Home {
    std::vector<LayerTensors::Member> members;
    std::string_view foreign;  // a tensor among the experts that nobody knows
  };
  struct Layer {
    struct Opened {
      std::mutex opening;
      std::shared_ptr<const LayerSource> source;  // none: not opened yet
    };
    std::map<std::string_view, Home> homes;  // by root
    PerProcess<Opened> opened;
  };

  std::string where() const;  // opens every message
  const Home& home(int layer, const Layer& of) const;

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::map<int, Layer> layers_;
};

}  // namespace kt
