#include "weights/expert_names.h"

#include <algorithm>
#include <array>
#include <span>

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
  const std::string_view last(at, static_cast<std::size_t>(begin + dotted.size() - at));
  dotted = {begin, static_cast<std::size_t>(at == begin ? 0 : at - 1 - begin)};
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
  found.first = found.last = projections[static_cast<std::size_t>(at - spelling.words.begin())];
  return true;
}

// `last` is a word of the spelling and a tail.
bool find_fused(const Spelling& spelling, std::string_view last, ExpertName& found) {
  const auto up_word = spelling.words[index_of(Projection::up)], down_word = spelling.words.back();
  const bool down = last.starts_with(down_word);
  if (!down && !last.starts_with(up_word)) return false;
  found.tail = find_tail(kFusedTails, last.substr((down ? down_word : up_word).size()));
  found.spelling = &spelling;
  found.first = down ? Projection::down : gate_up_of(spelling.gated.value_or(true)).front();
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

}  // namespace kt
