#include "weights/expert_names.h"

#include <algorithm>
#include <charconv>
#include <system_error>

#include "base/error.h"

namespace kt {
namespace {

constexpr std::string_view hole = "{expert}";

constexpr std::array schemes{
    // Qwen, DeepSeek, GLM, Kimi and most others on the hub.
    Scheme{"per-expert",
           {{{"experts.{expert}.gate_proj.weight"},
             {"experts.{expert}.up_proj.weight"},
             {"experts.{expert}.down_proj.weight"}}}},
    // Mixtral, MiniMax, LFM2.
    Scheme{
        "per-expert",
        {{{"experts.{expert}.w1.weight"}, {"experts.{expert}.w3.weight"}, {"experts.{expert}.w2.weight"}}}},
    // transformers 5: gate_up_proj [E, 2I, H] with the gate's rows first, down_proj [E, H, I].
    Scheme{"fused",
           {{{"experts.gate_up_proj", 0, 2}, {"experts.gate_up_proj", 1, 2}, {"experts.down_proj"}}}},
};

// What a name that no scheme knows says about its format.
struct Sign {
  std::string_view part, format;
};
constexpr std::array signs{
    Sign{"weight_scale_inv", "FP8 with block scales"},
    Sign{"proj_scale_inv", "FP8 with block scales"},
    Sign{"weight_packed", "compressed-tensors integers"},
    Sign{"_blocks", "MXFP4"},
    Sign{"_scales", "MXFP4"},
    Sign{"qweight", "GPTQ or AWQ integers"},
    Sign{"bias", "experts with biases"},
    Sign{"lora_", "an adapter, not a model"},
};

// A multi-token-prediction head numbers its layers from 0 again; it is no part of the model that is tuned.
constexpr std::string_view skipped_segment = "mtp";

// "a.b.c" gives "c" and leaves "a.b".
std::string_view take_last(std::string_view& dotted) {
  const auto dot = dotted.rfind('.');
  const auto last = dot == dotted.npos ? dotted : dotted.substr(dot + 1);
  dotted = dot == dotted.npos ? std::string_view{} : dotted.substr(0, dot);
  return last;
}

// Canonical decimals only, so that the number written back gives the same name.
std::optional<int> number(std::string_view text) {
  if (text.empty() || text.size() > 9 || (text.size() > 1 && text.front() == '0')) return std::nullopt;
  int n = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), n);
  if (error != std::errc{} || end != text.data() + text.size() || n < 0) return std::nullopt;
  return n;
}

// Sets root and expert when `name` ends in `tail`.
bool match(std::string_view name, std::string_view tail, ExpertName& found) {
  std::optional<int> expert;
  while (!tail.empty()) {
    const auto want = take_last(tail), have = take_last(name);
    if (want == hole) expert = number(have);
    if (want == hole ? !expert : want != have) return false;
  }
  found.root = name;
  found.expert = expert;
  return true;
}

// The number after the last "layers" of a root.
std::optional<int> layer_of(std::string_view root) {
  while (!root.empty()) {
    const auto n = number(take_last(root));
    auto before = root;
    if (n && take_last(before) == "layers") return n;
  }
  return std::nullopt;
}

bool has_segment(std::string_view dotted, std::string_view wanted) {
  while (!dotted.empty()) {
    if (take_last(dotted) == wanted) return true;
  }
  return false;
}

// "model.layers.3.mlp" of "model.layers.3.mlp.experts.anything"; empty when no segment is "experts".
std::string_view root_of(std::string_view name) {
  while (!name.empty()) {
    if (take_last(name) == "experts") return name;
  }
  return {};
}

}  // namespace

std::optional<ExpertName> parse_expert_name(std::string_view name) {
  ExpertName found{};
  found.root = root_of(name);
  for (const Scheme& scheme : schemes) {
    for (const Scheme::Place& place : scheme.places) {
      if (!match(name, place.tail, found)) continue;
      found.scheme = &scheme;
      break;
    }
    if (found.scheme != nullptr) break;
  }
  const auto layer = layer_of(found.root);
  if (!layer || has_segment(found.root, skipped_segment)) return std::nullopt;
  found.layer = *layer;
  return found;
}

std::string tensor_name(std::string_view root, const Scheme::Place& place, int expert) {
  std::string tail(place.tail);
  if (!place.fused()) tail.replace(tail.find(hole), hole.size(), std::to_string(expert));
  return message("{}.{}", root, tail);
}

std::string unsupported_format(std::string_view name) {
  const auto sign =
      std::ranges::find_if(signs, [&](const Sign& s) { return name.find(s.part) != name.npos; });
  return sign == signs.end() ? "an unknown expert layout" : message("{}: not supported yet", sign->format);
}

}  // namespace kt
