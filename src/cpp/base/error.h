// Errors and the check at the door. Every message names the argument, what it was and what was wanted.
#pragma once

#include <functional>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <string_view>

namespace kt {

// Bad argument or malformed file: ValueError in Python.
struct ValueError : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

// A file that is not there: FileNotFoundError in Python.
struct NotFoundError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The operating system refused: OSError in Python.
struct IoError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

namespace detail {

inline void append(std::ostringstream& out, std::string_view text) { out << text; }

template <class First, class... Rest>
void append(std::ostringstream& out, std::string_view text, const First& first, const Rest&... rest) {
  const auto hole = text.find("{}");
  if (hole == std::string_view::npos) {
    out << text;
    return;
  }
  out << text.substr(0, hole) << first;
  append(out, text.substr(hole + 2), rest...);
}

}  // namespace detail

// message("{} of {}", 3, 7) == "3 of 7". Names of files are made with it too, so that another library's
// std::locale::global, under which 12345 may be "12,345", has no say.
template <class... Args>
std::string message(std::string_view text, const Args&... args) {
  std::ostringstream out;
  out.imbue(std::locale::classic());
  detail::append(out, text, args...);
  return out.str();
}

// What text_of makes of each of some things, as a list.
template <class Things, class TextOf = std::identity>
std::string joined(const Things& things, const TextOf& text_of = {}, std::string_view between = ", ") {
  std::string text;
  for (const auto& thing : things) {
    if (!text.empty()) text += between;
    text += std::invoke(text_of, thing);
  }
  return text;
}

}  // namespace kt

#define KT_CHECK(condition, ...)                                          \
  do {                                                                    \
    if (!(condition)) throw ::kt::ValueError(::kt::message(__VA_ARGS__)); \
  } while (false)
