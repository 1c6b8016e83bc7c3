#include "weights/expert_index.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "base/error.h"
#include "weights/data_file.h"
#include "weights/json.h"

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

void ExpertIndex::Group::add(const Entry& entry, const ExpertName& name) {
  if (name.tail != nullptr)
    members.push_back({&entry, name});
  else if (foreign.empty())
    foreign = entry.name;
}

ExpertIndex::ExpertIndex(std::shared_ptr<const Checkpoint> checkpoint) : checkpoint_(std::move(checkpoint)) {
  std::string_view root;  // names are sorted: a root's follow each other
  Group* group = nullptr;
  for (const auto& entry : checkpoint_->tensors()) {
    const auto parsed = parse_expert_name(entry.name);
    if (!parsed) continue;
    if (group == nullptr || root != parsed->root) group = &layers_[parsed->layer].groups[root = parsed->root];
    group->add(entry, *parsed);
  }
}

ExpertIndex::ExpertIndex(const ExpertIndex& by_tables, const std::map<int, ExpertList>& lists)
    : checkpoint_(by_tables.checkpoint_) {
  for (const auto& [number, list] : lists) add(number, list, by_tables);
}

void ExpertIndex::add(int number, const ExpertList& list, const ExpertIndex& by_tables) {
  Layer& layer = layers_[number];
  layer.list = list, layer.spelling = layer.list.spelling();
  const std::string begin = dotted(list.prefix, "");
  const auto entries = checkpoint_->tensors();
  for (auto at = std::ranges::lower_bound(entries, begin, {}, &Entry::name);
       at != entries.end() && at->name.starts_with(begin); ++at) {
    auto parsed = parse_listed_name(at->name, layer.list, layer.spelling);
    if (!parsed) continue;
    parsed->layer = number;
    layer.groups[layer.list.prefix].add(*at, *parsed);
  }
  KT_CHECK(!layer.groups.empty(), "{}: layer {} has no tensor {}", where(), number, quote(begin + "*"));
  const auto same = by_tables.layers_.find(number);
  const bool found_by_tables =
      same != by_tables.layers_.end() && same->second.groups.size() == 1 &&
      same->second.groups.begin()->second.members.size() == layer.groups.begin()->second.members.size() &&
      list.prefix == dotted(same->second.groups.begin()->first, "experts");
  if (found_by_tables) return;
  const std::string name = dotted(list.prefix, list.first_expert);
  layer.tag = std::to_string(checksum(name));
}

std::string ExpertIndex::where() const { return quote(checkpoint_->path().native()); }

std::vector<int> ExpertIndex::layers() const {
  std::vector<int> numbers;
  for (const auto& entry : layers_) numbers.push_back(entry.first);
  return numbers;
}

const ExpertIndex::Group& ExpertIndex::only_group(int layer, const Layer& of) const {
  const auto& groups = of.groups;
  KT_CHECK(groups.size() == 1, "{}: layer {} is ambiguous: experts under both {} and {}", where(), layer,
           quote(groups.begin()->first), quote(std::next(groups.begin())->first));
  const Group& group = groups.begin()->second;
  KT_CHECK(group.foreign.empty(), "{}: layer {} has the tensor {}: {}", where(), layer, quote(group.foreign),
           unsupported_format(group.foreign));
  return group;
}

std::shared_ptr<const LayerSource> ExpertIndex::open(int layer) const {
  const auto at = layers_.find(layer);
  KT_CHECK(at != layers_.end(), "{}: no experts in layer {}; layers with experts: {}", where(), layer,
           ranges_text(layers()));
  const Layer& found = at->second;
  auto& [opening, source] = found.opened.get();
  const std::lock_guard lock(opening);
  if (!source)
    source = open_source(
        LayerTensors(checkpoint_, layer, only_group(layer, found).members, found.list.interleaved));
  return source;
}

}  // namespace kt
