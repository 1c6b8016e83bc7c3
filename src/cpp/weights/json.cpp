#include "weights/json.h"

#include <algorithm>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <unordered_set>

#include "base/error.h"

namespace kt {

namespace {

// The keys of an object. A header has an object of three for each tensor: a set for these would take most of
// its time.
class Keys {
 public:
  bool insert(const std::string& key) {  // false if it was there
    if (std::ranges::find(first_, key) != first_.end()) return false;
    if (first_.size() == kFirst) return others_.insert(key).second;
    first_.push_back(key);
    return true;
  }

 private:
  static constexpr std::size_t kFirst = 4;
  std::vector<std::string> first_;
  std::unordered_set<std::string> others_;
};

using Sax = nlohmann::json_sax<nlohmann::json>;
constexpr std::size_t kMaxDepth = 32;

}  // namespace

std::string quote(std::string_view text) {
  constexpr std::size_t kLongest = 300;
  const bool clipped = text.size() > kLongest;
  const nlohmann::json value(std::string(text.substr(0, kLongest)) + (clipped ? "..." : ""));
  return value.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string shape_text(std::span<const index_t> shape) {
  return "[" + joined(shape, [](index_t n) { return std::to_string(n); }) + "]";
}

std::string_view JsonScalar::name() const {
  switch (kind) {
    case Kind::null: return "null";
    case Kind::boolean: return "a boolean";
    case Kind::natural: return "a number";
    case Kind::number: return "a negative or fractional number";
    case Kind::string: return "a string";
  }
  return "unknown";
}

// nlohmann's events for a reader.
class JsonReader::Events final : public Sax {
 public:
  explicit Events(JsonReader& reader) : reader_(reader) {}

 private:
  using Kind = JsonScalar::Kind;

  bool give(JsonScalar scalar) {
    reader_.value(std::move(scalar));
    return true;
  }
  bool enter(Container kind) {
    KT_CHECK(levels_.size() < kMaxDepth, "{}: JSON nested deeper than {} levels", reader_.where_, kMaxDepth);
    reader_.open(kind);
    levels_.emplace_back();
    reader_.path_.emplace_back();
    return true;
  }
  bool leave() {
    levels_.pop_back();
    reader_.path_.pop_back();
    reader_.close();
    return true;
  }

  bool null() override { return give({}); }
  bool boolean(bool) override { return give({Kind::boolean}); }
  bool number_integer(number_integer_t) override { return give({Kind::number}); }
  bool number_unsigned(number_unsigned_t n) override { return give({Kind::natural, n}); }
  bool number_float(number_float_t, const string_t&) override { return give({Kind::number}); }
  bool string(string_t& text) override { return give({Kind::string, 0, std::move(text)}); }
  bool binary(binary_t&) override { return false; }  // only the binary dialects of JSON have it
  bool start_object(std::size_t) override { return enter(Container::object); }
  bool end_object() override { return leave(); }
  bool start_array(std::size_t) override { return enter(Container::array); }
  bool end_array() override { return leave(); }
  bool key(string_t& name) override {
    KT_CHECK(levels_.back().insert(name), "{}: duplicate key {}", reader_.where_, quote(name));
    reader_.path_.back() = std::move(name);
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::json::exception&) override {
    throw ValueError(message("{}: not JSON: syntax error at byte {}", reader_.where_, position));
  }

  JsonReader& reader_;
  std::vector<Keys> levels_;
};

void JsonReader::parse(std::string_view text) {
  // nlohmann takes a NUL byte for the end of its input, which would hide whatever follows.
  KT_CHECK(text.find('\0') == text.npos, "{}: not JSON: NUL byte at {}", where_, text.find('\0'));
  Events events(*this);
  Sax& sax = events;
  nlohmann::json::sax_parse(text.begin(), text.end(), &sax);
}

}  // namespace kt
