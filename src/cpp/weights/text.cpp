#include "weights/text.h"

#include <nlohmann/json.hpp>

namespace kt {

std::string quote(std::string_view text) {
  constexpr std::size_t kLongest = 300;
  const bool clipped = text.size() > kLongest;
  const nlohmann::json value(std::string(text.substr(0, kLongest)) + (clipped ? "..." : ""));
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string shape_text(std::span<const index_t> shape) {
  std::string text = "[";
  for (const index_t n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

}  // namespace kt
