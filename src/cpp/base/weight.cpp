#include "base/weight.h"

#include <string>

#include "base/error.h"

namespace kt {

Format format_from(std::string_view name) {
  const auto at = std::ranges::find(formats, name, &FormatTraits::name);
  if (at != formats.end()) return at->quantized.format;
  std::string names;
  for (const FormatTraits& row : formats)
    names += (&row == &formats.front()  ? ""
              : &row == &formats.back() ? " or "
                                        : ", ") +
             std::string(row.name);
  throw ValueError(message("format is \"{}\", wanted {}", name, names));
}

}  // namespace kt
