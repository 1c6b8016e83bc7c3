// What the environment says. The one place that reads it.
#pragma once

#include <cstdlib>
#include <optional>
#include <string>

namespace kt {

// An empty variable is as good as none.
inline std::optional<std::string> environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == '\0' ? std::nullopt : std::optional<std::string>(value);
}

}  // namespace kt
