#include "weights/expert_index.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/error.h"
#include "weights/text.h"

namespace kt {
namespace {

constexpr index_t max_experts = 1'000'000;  // far above any model, so that an int counts them

// "0-3, 7"
std::string ranges_text(const std::vector<int>& ascending) {
  std::string text;
  for (std::size_t i = 0; i < ascending.size();) {
    std::size_t last = i;
    while (last + 1 < ascending.size() && ascending[last + 1] == ascending[last] + 1) ++last;
    text += (text.empty() ? "" : ", ") + std::to_string(ascending[i]);
    if (last > i) text += "-" + std::to_string(ascending[last]);
    i = last + 1;
  }
  return text.empty() ? "none" : text;
}

}  // namespace

ExpertIndex::ExpertIndex(std::shared_ptr<const Checkpoint> checkpoint) : checkpoint_(std::move(checkpoint)) {
  for (const auto& entry : checkpoint_->tensors()) add(entry.name);
}

void ExpertIndex::add(std::string_view name) {
  const auto parsed = parse_expert_name(name);
  if (!parsed) return;
  Home& home = layers_[parsed->layer][std::string(parsed->root)];
  home.root = parsed->root;
  if (parsed->scheme == nullptr) {
    if (home.foreign.empty()) home.foreign = name;
    return;
  }
  if (home.scheme == nullptr) home.scheme = parsed->scheme;
  if (home.scheme != parsed->scheme) home.rival = name;
  if (parsed->expert) home.experts = std::max(home.experts, *parsed->expert + 1);
}

std::string ExpertIndex::where() const { return quote(checkpoint_->path().native()); }

std::vector<int> ExpertIndex::layers() const {
  std::vector<int> numbers;
  for (const auto& entry : layers_) numbers.push_back(entry.first);
  return numbers;
}

const ExpertIndex::Home& ExpertIndex::home(int layer) const {
  const auto at = layers_.find(layer);
  KT_CHECK(at != layers_.end(), "{}: no experts in layer {}; layers with experts: {}", where(), layer,
           ranges_text(layers()));
  const Layer& homes = at->second;
  KT_CHECK(homes.size() == 1, "{}: layer {} is ambiguous: experts under both {} and {}", where(), layer,
           quote(homes.begin()->first), quote(std::next(homes.begin())->first));
  const Home& home = homes.begin()->second;
  KT_CHECK(home.foreign.empty(), "{}: layer {} has the tensor {}: {}", where(), layer, quote(home.foreign),
           unsupported_format(home.foreign));
  KT_CHECK(home.rival.empty(), "{}: layer {} is stored in two layouts; {} belongs to the second", where(),
           layer, quote(home.rival));
  return home;
}

// Only the names and the first gate decide; every other tensor must agree with them.
LayerInfo ExpertIndex::sizes(int layer, const Home& home) const {
  const Scheme::Place& place = home.scheme->place(Projection::gate);
  const auto name = tensor_name(home.root, place, 0);
  const Checkpoint::Entry* entry = checkpoint_->find(name);
  KT_CHECK(entry != nullptr, "{}: layer {} has no tensor {}", where(), layer, quote(name));
  const StoredTensor* tensor = &entry->tensor;
  const auto type = tensor->type->dtype;
  KT_CHECK(type == DType::bf16 || type == DType::f16 || type == DType::f32,
           "{}: tensor {} is {}, which is not supported yet; wanted BF16, F16 or F32", where(), quote(name),
           tensor->type->name);
  const auto& shape = tensor->shape;
  const std::size_t rank = place.fused() ? 3 : 2;
  KT_CHECK(shape.size() == rank, "{}: tensor {} has shape {}, wanted {} dimensions", where(), quote(name),
           shape_text(shape), rank);
  KT_CHECK(std::ranges::none_of(shape, [](index_t n) { return n == 0; }),
           "{}: tensor {} has shape {}, wanted no 0", where(), quote(name), shape_text(shape));
  const index_t rows = shape[rank - 2], cols = shape[rank - 1];
  KT_CHECK(rows % place.parts == 0, "{}: tensor {} has shape {}, wanted {} equal parts of its rows", where(),
           quote(name), shape_text(shape), place.parts);
  const index_t experts = place.fused() ? shape[0] : home.experts;
  KT_CHECK(experts <= max_experts, "{}: tensor {} has {} experts, wanted at most {}", where(), quote(name),
           experts, max_experts);
  return {static_cast<int>(experts), cols, rows / place.parts, *type, tensor->type->name,
          home.scheme->layout,       0};
}

MatView ExpertIndex::stored(int layer, const Home& home, const LayerInfo& info, int expert,
                            Projection p) const {
  const auto fail = [&]<class... Args>(std::string_view name, std::string_view text, const Args&... args) {
    throw ValueError(message("{}: layer {}: tensor {} ", where(), layer, quote(name)) +
                     message(text, args...));
  };
  const Scheme::Place& place = home.scheme->place(p);
  const auto name = tensor_name(home.root, place, expert);
  const Checkpoint::Entry* entry = checkpoint_->find(name);
  if (entry == nullptr) fail(name, "is missing");
  const StoredTensor* tensor = &entry->tensor;
  if (tensor->type->dtype != info.dtype)
    fail(name, "is {}, the layer's first is {}", tensor->type->name, info.stored_type);

  const bool down = p == Projection::down;
  const index_t rows = down ? info.hidden_size : info.intermediate_size;
  const index_t cols = down ? info.intermediate_size : info.hidden_size;
  std::vector<index_t> wanted{rows * place.parts, cols};
  if (place.fused()) wanted.insert(wanted.begin(), info.num_experts);
  if (tensor->shape != wanted)
    fail(name, "has shape {}, wanted {}", shape_text(tensor->shape), shape_text(wanted));

  const auto align = size_of(info.dtype);
  if (tensor->offset % align != 0) {
    fail(name, "does not begin on a multiple of {} bytes; save the file again to align it", align);
  }
  const index_t above = place.fused() ? expert * wanted[1] : 0;
  const index_t all = place.fused() ? wanted[0] * wanted[1] : wanted[0];
  return view(checkpoint_->map(*entry).data(), info.dtype, all, cols)
      .block(above + place.part * rows, 0, rows, cols);
}

LayerInfo ExpertIndex::layer(int layer) const {
  const Home& found = home(layer);
  LayerInfo info = sizes(layer, found);
  for (int expert = 0; expert < info.num_experts; ++expert) {
    for (const Projection p : projections) {
      const MatView m = stored(layer, found, info, expert, p);
      info.nbytes += static_cast<std::size_t>(m.rows * m.cols) * size_of(m.dtype);
    }
  }
  return info;
}

MatView ExpertIndex::expert(int layer, int expert, Projection p) const {
  const Home& found = home(layer);
  const LayerInfo info = sizes(layer, found);
  KT_CHECK(expert >= 0 && expert < info.num_experts, "expert is {}, but layer {} has {} experts", expert,
           layer, info.num_experts);
  return stored(layer, found, info, expert, p);
}

}  // namespace kt
