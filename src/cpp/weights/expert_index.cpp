#include "weights/expert_index.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/error.h"
#include "weights/checksum.h"
#include "weights/text.h"

namespace kt {
namespace {

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
  std::string_view root;  // names are sorted: a root's follow each other
  Home* home = nullptr;
  for (const auto& entry : checkpoint_->tensors()) {
    const auto parsed = parse_expert_name(entry.name);
    if (!parsed) continue;
    if (home == nullptr || root != parsed->root) home = &layers_[parsed->layer].homes[root = parsed->root];
    if (parsed->tail == nullptr) {
      if (home->foreign.empty()) home->foreign = entry.name;
    } else {
      home->members.push_back({&entry, *parsed});
    }
  }
}

ExpertIndex::ExpertIndex(const ExpertIndex& by_tables, const std::map<int, ExpertList>& lists)
    : checkpoint_(by_tables.checkpoint_) {
  for (const auto& [number, list] : lists) add(number, list, by_tables);
}

void ExpertIndex::add(int number, const ExpertList& list, const ExpertIndex& by_tables) {
  Layer& layer = layers_[number];
  layer.list = list, layer.spelling = layer.list.spelling();
  const std::string begin = list.prefix + '.';
  const auto entries = checkpoint_->tensors();
  for (auto at = std::ranges::lower_bound(entries, begin, {}, &Checkpoint::Entry::name);
       at != entries.end() && at->name.starts_with(begin); ++at) {
    auto parsed = parse_listed_name(at->name, layer.list, layer.spelling);
    if (!parsed) continue;
    parsed->layer = number;
    Home& home = layer.homes[layer.list.prefix];
    if (parsed->tail == nullptr) {
      if (home.foreign.empty()) home.foreign = at->name;
    } else {
      home.members.push_back({&*at, *parsed});
    }
  }
  KT_CHECK(!layer.homes.empty(), "{}: layer {} has no tensor {}", where(), number, quote(begin + "*"));
  const auto same = by_tables.layers_.find(number);
  const bool found_by_tables =
      same != by_tables.layers_.end() && same->second.homes.size() == 1 &&
      same->second.homes.begin()->second.members.size() == layer.homes.begin()->second.members.size() &&
      list.prefix == message("{}.experts", same->second.homes.begin()->first);
  if (found_by_tables) return;
  const std::string name = message("{}.{}", list.prefix, list.first_expert);
  layer.tag = std::to_string(checksum(std::as_bytes(std::span(name))));
}

std::string ExpertIndex::where() const { return quote(checkpoint_->path().native()); }

std::vector<int> ExpertIndex::layers() const {
  std::vector<int> numbers;
  for (const auto& entry : layers_) numbers.push_back(entry.first);
  return numbers;
}

const ExpertIndex::Home& ExpertIndex::home(int layer, const Layer& of) const {
  const auto& homes = of.homes;
  KT_CHECK(homes.size() == 1, "{}: layer {} is ambiguous: experts under both {} and {}", where(), layer,
           quote(homes.begin()->first), quote(std::next(homes.begin())->first));
  const Home& home = homes.begin()->second;
  KT_CHECK(home.foreign.empty(), "{}: layer {} has the tensor {}: {}", where(), layer, quote(home.foreign),
           unsupported_format(home.foreign));
  return home;
}

std::shared_ptr<const LayerSource> ExpertIndex::open(int layer) const {
  const auto at = layers_.find(layer);
  KT_CHECK(at != layers_.end(), "{}: no experts in layer {}; layers with experts: {}", where(), layer,
           ranges_text(layers()));
  const Layer& found = at->second;
  auto& [opening, source] = found.opened.get();
  const std::lock_guard lock(opening);
  if (!source)
    source =
        open_source(LayerTensors(checkpoint_, layer, home(layer, found).members, found.list.interleaved));
  return source;
}

}  // namespace kt
