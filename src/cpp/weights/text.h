// How names from files appear in error messages.
#pragma once

#include <span>
#include <string>
#include <string_view>

#include "base/view.h"

namespace kt {

// In double quotes, escaped, valid UTF-8 whatever came in, clipped when long.
std::string quote(std::string_view text);

// "[2, 3]"
std::string shape_text(std::span<const index_t> shape);

}  // namespace kt
