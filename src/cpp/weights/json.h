// JSON from strangers: read as a stream of events, never as a tree, so that what a hostile file costs is
// bounded by what its reader keeps. And names from files as error messages show them.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/view.h"

namespace kt {

// In double quotes, escaped, valid UTF-8 whatever came in, clipped when long.
std::string quote(std::string_view text);

// "[2, 3]"
std::string shape_text(std::span<const index_t> shape);

// A JSON value that is neither object nor array.
struct JsonScalar {
  enum class Kind : std::uint8_t { null, boolean, natural, number, string };

  Kind kind = Kind::null;
  std::uint64_t natural = 0;  // Kind::natural: an integer in [0, 2^64)
  std::string text = {};      // Kind::string

  bool is_natural() const { return kind == Kind::natural; }
  bool is_string() const { return kind == Kind::string; }
  std::string_view name() const;  // "a string"
};

// Refuses syntax errors, duplicate keys and deep nesting; what the events must be is the derived reader's
// business.
class JsonReader {
 public:
  // `where` opens every message, e.g. the quoted name of the file.
  explicit JsonReader(std::string where) : where_(std::move(where)) {}
  virtual ~JsonReader() = default;

  void parse(std::string_view text);

 protected:
  enum class Container : std::uint8_t { object, array };

  // `path()` is the path of the value that opens or is given.
  virtual void open(Container kind) = 0;
  virtual void close() = 0;  // `path()` is that of the value that closes
  virtual void value(JsonScalar scalar) = 0;

  const std::string& where() const { return where_; }
  // Keys from the root; an array's element has an empty key. Empty for the root itself.
  const std::vector<std::string>& path() const { return path_; }

 private:
  class Events;

  std::string where_;
  std::vector<std::string> path_;
};

}  // namespace kt
