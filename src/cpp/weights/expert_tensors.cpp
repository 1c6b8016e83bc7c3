#include "weights/expert_tensors.h"

#include <algorithm>
#include <array>
#include <span>
#include <utility>

namespace kt {

namespace {

// Qwen, DeepSeek, GLM, Kimi and most others on the hub, without a gate Nemotron-H; Mixtral, MiniMax, LFM2.
constexpr Spelling kGateUpDown{Form::per_expert, {"gate_proj", "up_proj", "down_proj"}, std::nullopt};
constexpr Spelling kW1W3W2{Form::per_expert, {"w1", "w3", "w2"}};
// transformers 5, gpt-oss, Llama 4.
constexpr Spelling kFused{Form::fused, {"gate_up_proj", "gate_up_proj", "down_proj"}};
// Files that kt-kernel writes.
constexpr Spelling kKt{Form::kt, {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}};

// experts.{expert}.{word}.{tail}
constexpr std::array kExpertTails{
    Tail{"weight", Encoding::plain, Role::weight},
    Tail{"weight_scale_inv", Encoding::plain, Role::scale},
    Tail{"weight_scale", Encoding::any, Role::scale},
    Tail{"weight_packed", Encoding::packed, Role::weight},
    Tail{"weight_shape", Encoding::packed, Role::shape},
    Tail{"weight_zero_point", Encoding::packed, Role::zeros},
    Tail{"weight_global_scale", Encoding::packed, Role::global_scale},
    Tail{"weight_scale_2", Encoding::plain, Role::global_scale},
    Tail{"weight_g_idx", Encoding::packed, Role::order},
    Tail{"qweight", Encoding::gptq, Role::weight},
    Tail{"scales", Encoding::gptq, Role::scale},
    Tail{"qzeros", Encoding::gptq, Role::zeros},
    Tail{"g_idx", Encoding::gptq, Role::order},
    Tail{"bias", Encoding::any, Role::bias},
    Tail{"input_scale", Encoding::any, Role::unused},
    Tail{"input_global_scale", Encoding::any, Role::unused},
    Tail{"activation_scale", Encoding::any, Role::unused},
};
// experts.{word}{tail}
constexpr std::array kFusedTails{
    Tail{"", Encoding::plain, Role::weight},        Tail{"_scale_inv", Encoding::plain, Role::scale},
    Tail{"_blocks", Encoding::mxfp4, Role::weight}, Tail{"_scales", Encoding::mxfp4, Role::scale},
    Tail{"_bias", Encoding::any, Role::bias},       Tail{"_activation_scale", Encoding::any, Role::unused},
};
// blk.{layer}.{word}.{expert}.numa.{part}.{tail}
constexpr std::array kKtTails{
    Tail{"weight", Encoding::kt, Role::weight},
    Tail{"scale", Encoding::kt, Role::scale},
};

// What a name that no table knows says about its format.
struct Sign {
  std::string_view part, format;
};
constexpr std::array kSigns{
    Sign{"weight_scale_2", "NVFP4 of fused experts"},
    Sign{"weight_global_scale", "NVFP4 of fused experts"},
    Sign{"lora_", "an adapter, not a model"},
};

// Of the outputs of all experts of a layer: it stays with the model.
constexpr std::string_view kOutputNorm = ".experts.post_expert_norm.weight";

// A multi-token-prediction head numbers its layers from 0 again; it is no part of the model that is tuned.
constexpr std::string_view kSkippedSegment = "mtp";

// "a.b.c" gives "c" and leaves "a.b".
std::string_view take_last(std::string_view& dotted) {
  const char* const begin = dotted.data();
  const char* at = begin + dotted.size();
  while (at != begin && at[-1] != '.') --at;
  const std::string_view last(at, to_size(begin + dotted.size() - at));
  dotted = {begin, to_size(at == begin ? 0 : at - 1 - begin)};
  return last;
}

// Canonical decimals only, so that the number written back gives the same name.
std::optional<int> number(std::string_view text) {
  if (text.empty() || text.size() > 9 || (text.size() > 1 && text.front() == '0')) return std::nullopt;
  int n = 0;
  for (const char c : text) {
    if (c < '0' || c > '9') return std::nullopt;
    n = 10 * n + (c - '0');
  }
  return n;
}

const Tail* find_tail(std::span<const Tail> tails, std::string_view text) {
  const auto at = std::ranges::find(tails, text, &Tail::text);
  return at == tails.end() ? nullptr : &*at;
}

bool find_word(const Spelling& spelling, std::string_view word, ExpertName& found) {
  const auto at = std::ranges::find(spelling.words, word);
  if (at == spelling.words.end() || word.empty()) return false;
  found.spelling = &spelling;
  found.first = found.last = projections[to_size(at - spelling.words.begin())];
  return true;
}

// `last` is a word of the spelling and a tail.
bool find_fused(const Spelling& spelling, std::string_view last, ExpertName& found) {
  const auto up_word = spelling.words[index_of(Projection::up)], down_word = spelling.words.back();
  const bool down = last.starts_with(down_word);
  if (!down && !last.starts_with(up_word)) return false;
  found.tail = find_tail(kFusedTails, last.substr((down ? down_word : up_word).size()));
  found.spelling = &spelling;
  found.first = down ? Projection::down : x_projections_of(spelling.gated.value_or(true)).front();
  found.last = down ? Projection::down : Projection::up;
  return true;
}

bool parse_per_expert(std::string_view name, ExpertName& found) {
  const auto tail = take_last(name), word = take_last(name);
  const auto expert = number(take_last(name));
  found.list = name;
  if (!expert || take_last(name) != "experts") return false;
  if (!find_word(kGateUpDown, word, found) && !find_word(kW1W3W2, word, found)) return false;
  found.tail = find_tail(kExpertTails, tail);
  found.expert = *expert;
  found.root = name;
  return found.tail != nullptr;
}

bool parse_fused(std::string_view name, ExpertName& found) {
  const auto last = take_last(name);
  found.list = name;
  if (take_last(name) != "experts" || !find_fused(kFused, last, found)) return false;
  found.root = name;
  return found.tail != nullptr;
}

bool parse_kt(std::string_view name, ExpertName& found) {
  const auto tail = take_last(name);
  const auto part = number(take_last(name));
  if (!part || take_last(name) != "numa") return false;
  const auto expert = number(take_last(name));
  if (!expert || !find_word(kKt, take_last(name), found)) return false;
  found.tail = find_tail(kKtTails, tail);
  found.expert = *expert;
  found.part = *part;
  found.root = found.list = name;
  return found.tail != nullptr;
}

// The number after the last "layers" or "blk" of a root that is part of the model.
std::optional<int> layer_of(std::string_view root) {
  std::optional<int> layer, after;
  while (!root.empty()) {
    const auto segment = take_last(root);
    if (segment == kSkippedSegment) return std::nullopt;
    if (!layer && after && (segment == "layers" || segment == "blk")) layer = after;
    if (!layer) after = number(segment);
  }
  return layer;
}

// "model.layers.3.mlp" of "model.layers.3.mlp.experts.anything"; empty when no segment means experts.
std::string_view root_of(std::string_view name) {
  while (!name.empty()) {
    const auto segment = take_last(name);
    if (segment == "experts" || std::ranges::find(kKt.words, segment) != kKt.words.end()) return name;
  }
  return {};
}

}  // namespace

std::optional<ExpertName> parse_expert_name(std::string_view name) {
  if (name.ends_with(kOutputNorm)) return std::nullopt;
  ExpertName found{};
  if (!parse_per_expert(name, found) && !parse_fused(name, found) && !parse_kt(name, found)) {
    if (name.find("exp") == name.npos) return std::nullopt;  // most tensors that are not experts leave here
    found = {};
    found.root = root_of(name);
  }
  const auto layer = layer_of(found.root);
  if (!layer) return std::nullopt;
  found.layer = *layer;
  return found;
}

std::optional<ExpertName> parse_listed_name(std::string_view name, const ExpertList& list,
                                            const Spelling& spelling) {
  ExpertName found{};
  found.root = found.list = name.substr(0, list.prefix.size());
  auto rest = name.substr(list.prefix.size() + 1);
  if (spelling.form == Form::fused) {
    if (!find_fused(spelling, rest, found)) return std::nullopt;
    return found;
  }
  const auto dot = std::min(rest.find('.'), rest.size());
  const auto expert = number(rest.substr(0, dot));
  if (!expert || *expert < list.first_expert || *expert >= list.first_expert + list.num_experts)
    return std::nullopt;
  rest.remove_prefix(std::min(dot + 1, rest.size()));
  const auto tail = take_last(rest);
  if (find_word(spelling, rest, found)) found.tail = find_tail(kExpertTails, tail);
  found.expert = *expert - list.first_expert;
  return found;
}

std::string tensor_name(const ExpertName& like, Projection p, int expert, int part) {
  const auto tail = like.tail->text, word = like.spelling->words[index_of(p)];
  switch (like.spelling->form) {
    case Form::per_expert: return dotted(like.list, expert, word, tail);
    case Form::fused: return dotted(like.list, word) + std::string(tail);
    case Form::kt: return dotted(like.list, word, expert, "numa", part, tail);
  }
  return {};
}

std::string unsupported_format(std::string_view name) {
  const auto sign =
      std::ranges::find_if(kSigns, [&](const Sign& s) { return name.find(s.part) != name.npos; });
  return sign == kSigns.end() ? "an unknown expert layout" : message("{}: not supported", sign->format);
}

LayerTensors::LayerTensors(std::shared_ptr<const Checkpoint> checkpoint, int layer,
                           std::span<const Member> members, std::optional<bool> interleaved)
    : checkpoint_(std::move(checkpoint)), layer_(layer), interleaved_(interleaved) {
  decide_layout(members);
  fill(members);
  KT_CHECK(has(Role::weight), "{}: layer {} has tensors such as {} but no weights beside them",
           quote(checkpoint_->path().native()), layer_, quote(members.front().entry->name));
  check_complete();
  check_alike();
}

std::string LayerTensors::where(std::string_view tensor) const {
  return message("{}: layer {}: tensor {}", quote(checkpoint_->path().native()), layer_, quote(tensor));
}

void LayerTensors::decide_layout(std::span<const Member> members) {
  spelling_ = members.front().name.spelling;
  for (const auto& [entry, name] : members) {
    const Encoding encoding = name.tail->encoding;
    if (encoding_ == Encoding::any) encoding_ = encoding;
    KT_CHECK(name.spelling == spelling_ && (encoding == Encoding::any || encoding == encoding_),
             "{}: layer {} is stored in two layouts; {} belongs to the second",
             quote(checkpoint_->path().native()), layer_, quote(entry->name));
  }
  gated_ = spelling_->gated.value_or(std::ranges::any_of(
      members, [](const Member& member) { return member.name.first == Projection::gate; }));
}

void LayerTensors::fill(std::span<const Member> members) {
  // More experts than tensors: one of the first must be missing, and a number in a name costs no memory.
  const int most = to_int(members.size()) + 1;
  for (const auto& [entry, name] : members) {
    experts_ = std::max(experts_, std::min(name.expert + 1, most));
    parts_ = std::max(parts_, std::min(name.part + 1, most));
  }
  const auto cells = to_size(experts_) * to_size(parts_);
  KT_CHECK(parts_ == 1 || cells <= members.size(),
           "{}: layer {} has {} experts in {} parts but {} tensors; some are missing",
           quote(checkpoint_->path().native()), layer_, experts_, parts_, members.size());
  grid_.resize(cells * kt::projections.size() * kRoleCount);
  for (const auto& [entry, name] : members) {
    nbytes_ += entry->tensor.nbytes;
    const Role role = name.tail->role;
    if (role == Role::unused || name.expert >= experts_) continue;
    auto& like = likes_[to_size(role)];
    if (!like) like = name;
    for (const Projection p : projections()) {
      if (p < name.first || p > name.last) continue;
      const Entry*& cell = grid_[place(name.expert, p, role, name.part)];
      if (cell != nullptr) fail(*entry, "says the same as {}", quote(cell->name));
      cell = entry;
    }
  }
}

void LayerTensors::check_complete() const {
  for (int expert = 0; expert < experts_; ++expert) {
    for (const Projection p : projections()) {
      for (int part = 0; part < parts_; ++part) {
        for (std::size_t role = 0; role < kRoleCount; ++role) {
          if (!likes_[role] || grid_[place(expert, p, static_cast<Role>(role), part)] != nullptr) continue;
          throw ValueError(message("{} is missing", where(tensor_name(*likes_[role], p, expert, part))));
        }
      }
    }
  }
}

void LayerTensors::check_alike() const {
  for (std::size_t at = 0; at < grid_.size(); ++at) {
    if (grid_[at] == nullptr) continue;
    const Role role = static_cast<Role>(at % kRoleCount);
    const Projection p = kt::projections[at / kRoleCount / to_size(parts_) % kt::projections.size()];
    const StoredTensor &tensor = grid_[at]->tensor, &wanted = first(p, role).tensor;
    const auto* type = first(role).tensor.type;
    if (tensor.type != type)
      fail(*grid_[at], "is {}, the layer's first is {}", tensor.type->name, type->name);
    if (tensor.shape != wanted.shape)
      fail(*grid_[at], "has shape {}, wanted {}", shape_text(tensor.shape), shape_text(wanted.shape));
  }
}

void LayerTensors::want_role(Role role, std::string_view called) const {
  if (!has(role)) fail(first(Role::weight), "has no {} beside it", called);
}

void LayerTensors::want_shape(Projection p, Role role, const std::vector<index_t>& wanted) const {
  const Entry& entry = first(p, role);
  if (entry.tensor.shape != wanted)
    fail(entry, "has shape {}, wanted {}", shape_text(entry.tensor.shape), shape_text(wanted));
}

}  // namespace kt
