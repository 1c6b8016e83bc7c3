// Reads JSON as a stream of events, never as a tree: what a hostile file costs is bounded by what its reader
// keeps. Refuses syntax errors, duplicate keys and deep nesting; what the events must be is the derived
// reader's business.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <unordered_set>
#include <utility>
#include <vector>

#include "base/error.h"
#include "weights/text.h"

namespace kt {

// A JSON value that is neither object nor array.
struct JsonScalar {
  enum class Kind : std::uint8_t { null, boolean, natural, number, string };

  Kind kind = Kind::null;
  std::uint64_t natural = 0;  // Kind::natural: an integer in [0, 2^64)
  std::string text;           // Kind::string

  bool is_natural() const { return kind == Kind::natural; }
  bool is_string() const { return kind == Kind::string; }
  std::string_view name() const {
    switch (kind) {
      case Kind::null: return "null";
      case Kind::boolean: return "a boolean";
      case Kind::natural: return "a number";
      case Kind::number: return "a negative or fractional number";
      case Kind::string: return "a string";
    }
    return "unknown";
  }
};

class JsonEvents : private nlohmann::json_sax<nlohmann::json> {
 public:
  // `where` opens every message, e.g. the quoted name of the file.
  explicit JsonEvents(std::string where) : where_(std::move(where)) {}

  void parse(std::string_view text) {
    // nlohmann takes a NUL byte for the end of its input, which would hide whatever follows.
    KT_CHECK(text.find('\0') == text.npos, "{}: not JSON: NUL byte at {}", where_, text.find('\0'));
    nlohmann::json::sax_parse(text.begin(), text.end(), static_cast<json_sax*>(this));
  }

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
  // The keys of an object. A header has an object of three for each tensor: a set for these would take most
  // of its time.
  class Keys {
   public:
    bool insert(const std::string& key) {  // false if it was there
      if (std::ranges::find(first_, key) != first_.end()) return false;
      if (first_.size() == kFew) return others_.insert(key).second;
      first_.push_back(key);
      return true;
    }

   private:
    static constexpr std::size_t kFew = 4;
    std::vector<std::string> first_;
    std::unordered_set<std::string> others_;
  };
  struct Level {
    Container kind;
    Keys keys;
  };
  static constexpr std::size_t kMaxDepth = 32;

  bool enter(Container kind) {
    KT_CHECK(levels_.size() < kMaxDepth, "{}: JSON nested deeper than {} levels", where_, kMaxDepth);
    open(kind);
    levels_.push_back({kind, {}});
    path_.emplace_back();
    return true;
  }
  bool leave() {
    levels_.pop_back();
    path_.pop_back();
    close();
    return true;
  }
  bool give(JsonScalar scalar) {
    value(std::move(scalar));
    return true;
  }

  using Kind = JsonScalar::Kind;
  bool null() override { return give({}); }
  bool boolean(bool) override { return give({Kind::boolean, 0, {}}); }
  bool number_integer(number_integer_t) override { return give({Kind::number, 0, {}}); }
  bool number_unsigned(number_unsigned_t n) override { return give({Kind::natural, n, {}}); }
  bool number_float(number_float_t, const string_t&) override { return give({Kind::number, 0, {}}); }
  bool string(string_t& text) override { return give({Kind::string, 0, std::move(text)}); }
  bool binary(binary_t&) override { return false; }  // only the binary dialects of JSON have it
  bool start_object(std::size_t) override { return enter(Container::object); }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override { return enter(Container::array); }
  bool end_array() override { return leave(); }
  bool key(string_t& name) override {
    KT_CHECK(levels_.back().keys.insert(name), "{}: duplicate key {}", where_, quote(name));
    path_.back() = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw ValueError(message("{}: not JSON: syntax error at byte {}", where_, position));
  }

  std::string where_;
  std::vector<Level> levels_;
  std::vector<std::string> path_;
};

}  // namespace kt
