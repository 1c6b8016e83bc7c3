#include "weights/weight_map.h"

#include <algorithm>
#include <cstddef>
#include <filesystem>
#include <span>

#include "base/error.h"
#include "weights/json_events.h"
#include "weights/text.h"

namespace kt {
namespace {

constexpr std::uint64_t kMaxIndex = 100'000'000;  // bytes, as for a header: 91,000 tensors take 10 MB

// Takes weight_map from an index and skips the rest.
class IndexReader final : JsonEvents {
 public:
  using JsonEvents::JsonEvents;

  WeightMap read(std::string_view text) {
    parse(text);
    KT_CHECK(found_, "{}: no weight_map", where());
    std::ranges::sort(weight_map_);
    return std::move(weight_map_);
  }

 private:
  bool in_map() const { return !path().empty() && path().front() == "weight_map"; }

  void open(Container kind) override {
    if (path().empty()) KT_CHECK(kind == Container::object, "{}: an array, wanted an object", where());
    if (!in_map()) return;
    KT_CHECK(path().size() == 1, "{}: weight_map has no file name for {}", where(), quote(path()[1]));
    KT_CHECK(kind == Container::object, "{}: weight_map is an array, wanted an object", where());
    found_ = true;
  }
  void value(JsonScalar scalar) override {
    KT_CHECK(!path().empty(), "{}: {}, wanted an object", where(), scalar.name());
    if (!in_map()) return;
    KT_CHECK(path().size() == 2, "{}: weight_map is {}, wanted an object", where(), scalar.name());
    KT_CHECK(scalar.is_string(), "{}: weight_map gives {} for {}, wanted a file name", where(), scalar.name(),
             quote(path()[1]));
    const auto& name = path()[1];
    // Checked once for a run of tensors of the same file.
    if (weight_map_.empty() || weight_map_.back().second != scalar.text)
      KT_CHECK(stays_inside(scalar.text), "{}: tensor {} is in {}, wanted a file in the index's directory",
               where(), quote(name), quote(scalar.text));
    weight_map_.emplace_back(name, std::move(scalar.text));
  }
  void close() override {}

  bool found_ = false;
  WeightMap weight_map_;
};

}  // namespace

bool stays_inside(const std::filesystem::path& relative) {
  return !relative.empty() && relative.is_relative() && std::ranges::find(relative, "..") == relative.end() &&
         relative.native().find('\0') == std::string::npos;
}

WeightMap parse_weight_map(std::string_view json, const std::string& where) {
  return IndexReader(where).read(json);
}

WeightMap read_weight_map(const OpenFile& file) {
  const auto where = quote(file.path().native());
  const std::uint64_t size = file.stamp().size;
  KT_CHECK(size <= kMaxIndex, "{}: {} bytes long, wanted at most {}", where, size, kMaxIndex);
  std::string json(static_cast<std::size_t>(size), '\0');
  file.read(0, std::as_writable_bytes(std::span(json)));
  return parse_weight_map(json, where);
}

}  // namespace kt
