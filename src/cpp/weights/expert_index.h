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
#include "weights/expert_tensors.h"
#include "weights/layer_source.h"

namespace kt {

class ExpertIndex {
 public:
  explicit ExpertIndex(std::shared_ptr<const Checkpoint> checkpoint);

  // Of the same checkpoint, with the experts that somebody who knows the model names: each list is a layer.
  ExpertIndex(const ExpertIndex& by_tables, const std::map<int, ExpertList>& lists);

  const Checkpoint& checkpoint() const { return *checkpoint_; }

  // Layers that hold experts, ascending, whether or not we can read their format.
  std::vector<int> layers() const;

  // Checks every tensor of the layer. Throws ValueError: no such layer, an expert that is missing, shapes or
  // types that disagree, a format that is not supported.
  // Thread-safe; opens a layer once.
  std::shared_ptr<const LayerSource> open(int layer) const;
  LayerInfo layer(int layer) const { return open(layer)->info(); }
  // Tells the layer from others of its number in the same checkpoint; empty if the tables find the same one.
  std::string tag(int layer) const { return layers_.at(layer).tag; }

 private:
  // The experts under one root, e.g. "model.layers.3.mlp".
  struct Group {
    std::vector<LayerTensors::Member> members;
    std::string_view foreign;  // a tensor among the experts that nobody knows

    void add(const Entry& entry, const ExpertName& name);
  };
  struct Layer {
    struct Opened {
      std::mutex opening;
      std::shared_ptr<const LayerSource> source;  // none: not opened yet
    };
    std::map<std::string_view, Group> groups;  // by root
    ExpertList list;                           // if it was given, with views of it in the members
    Spelling spelling;
    std::string tag;
    PerProcess<Opened> opened;
  };

  std::string where() const;  // opens every message
  const Group& only_group(int layer, const Layer& of) const;
  void add(int number, const ExpertList& list, const ExpertIndex& by_tables);

  std::shared_ptr<const Checkpoint> checkpoint_;
  std::map<int, Layer> layers_;
};

}  // namespace kt
