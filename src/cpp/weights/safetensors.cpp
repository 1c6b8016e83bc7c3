#include "weights/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <limits>
#include <utility>

#include "base/error.h"
#include "weights/json.h"

namespace kt {
namespace {

static_assert(std::endian::native == std::endian::little, "the format's numbers are read in place");

constexpr std::size_t kLengthBytes = 8;  // the header's length, before the header
// The reference implementation's limit for a header, and far above an index: 91,000 tensors take 10 MB.
constexpr std::uint64_t kMaxJson = 100'000'000;
constexpr std::string_view kMetadataKey = "__metadata__";

constexpr std::array<StoredType, 22> kTypes{{
    {"BOOL", 8, {}},         {"F4", 4, {}},           {"F6_E2M3", 6, {}},        {"F6_E3M2", 6, {}},
    {"U8", 8, {}},           {"I8", 8, {}},           {"F8_E5M2", 8, {}},        {"F8_E4M3", 8, {}},
    {"F8_E8M0", 8, {}},      {"F8_E4M3FNUZ", 8, {}},  {"F8_E5M2FNUZ", 8, {}},    {"I16", 16, {}},
    {"U16", 16, {}},         {"F16", 16, DType::f16}, {"BF16", 16, DType::bf16}, {"I32", 32, DType::i32},
    {"U32", 32, {}},         {"F32", 32, DType::f32}, {"C64", 64, {}},           {"F64", 64, {}},
    {"I64", 64, DType::i64}, {"U64", 64, {}},
}};

// Collects the header's tensors and checks each against the size of the data.
class HeaderReader final : JsonReader {
 public:
  using Row = SafetensorsHeader::Row;

  HeaderReader(std::string file, std::uint64_t data_offset, std::uint64_t data_size)
      : JsonReader(std::move(file)), data_offset_(data_offset), data_size_(data_size) {}

  std::vector<Row> read(std::string_view header) {
    // nlohmann would skip a byte-order mark; the format wants the brace first.
    KT_CHECK(header.starts_with('{'), "{}: header is not a JSON object: it does not begin with '{'", where());
    parse(header);
    check_coverage();
    std::ranges::sort(rows_, {}, &Row::name);
    return std::move(rows_);
  }

 private:
  struct Fields {
    std::optional<std::string> dtype;
    std::optional<std::vector<std::uint64_t>> shape, data_offsets;
  };

  bool in_metadata() const { return path().front() == kMetadataKey; }
  std::string tensor() const { return message("{}: tensor {}", where(), quote(path().front())); }

  std::vector<std::uint64_t>& list() {
    auto& found = path()[1] == "shape" ? fields_.shape : fields_.data_offsets;
    return found ? *found : found.emplace();
  }

  void open(Container kind) override {
    const bool object = kind == Container::object;
    const std::string_view found = object ? "an object" : "an array";
    switch (path().size()) {
      case 0: return;  // read() has seen the brace
      case 1:
        KT_CHECK(object, "{} is {}, wanted an object", tensor(), found);
        fields_ = {};
        return;
      case 2:
        KT_CHECK(!in_metadata(), "{}: {} maps {} to {}, wanted a string", where(), kMetadataKey,
                 quote(path()[1]), found);
        KT_CHECK(path()[1] == "shape" || path()[1] == "data_offsets", "{} has {} as its {}", tensor(), found,
                 quote(path()[1]));
        KT_CHECK(!object, "{} has an object as its {}, wanted an array", tensor(), path()[1]);
        list();
        return;
      default: throw ValueError(message("{}: {} holds {}, wanted integers", tensor(), path()[1], found));
    }
  }

  void value(JsonScalar scalar) override {
    if (path().size() == 1) {
      throw ValueError(message("{} is {}, wanted an object", tensor(), scalar.name()));
    }
    if (in_metadata()) {
      KT_CHECK(scalar.is_string(), "{}: {} maps {} to {}, wanted a string", where(), kMetadataKey,
               quote(path()[1]), scalar.name());
    } else if (path().size() == 2) {
      KT_CHECK(path()[1] == "dtype", "{} has {} as its {}, wanted dtype, shape and data_offsets", tensor(),
               scalar.name(), quote(path()[1]));
      KT_CHECK(scalar.is_string(), "{}: dtype is {}, wanted a string", tensor(), scalar.name());
      fields_.dtype = std::move(scalar.text);
    } else {
      KT_CHECK(scalar.is_natural(), "{}: {} holds {}, wanted non-negative integers", tensor(), path()[1],
               scalar.name());
      KT_CHECK(list().size() < kMaxRank, "{}: {} holds more than {} numbers", tensor(), path()[1], kMaxRank);
      list().push_back(scalar.natural);
    }
  }

  void close() override {
    if (path().size() == 1 && !in_metadata()) add_tensor();
  }

  void add_tensor() {
    KT_CHECK(fields_.dtype, "{} has no dtype", tensor());
    KT_CHECK(fields_.shape, "{} has no shape", tensor());
    KT_CHECK(fields_.data_offsets, "{} has no data_offsets", tensor());
    const StoredType& type = checked_type(*fields_.dtype);
    std::vector<index_t> shape = checked_shape(*fields_.shape);
    const auto& offsets = *fields_.data_offsets;
    KT_CHECK(offsets.size() == 2, "{}: data_offsets holds {} numbers, wanted 2", tensor(), offsets.size());
    const auto begin = offsets[0], end = offsets[1];
    KT_CHECK(begin <= end && end <= data_size_,
             "{}: data_offsets are [{}, {}], wanted an ordered pair within the {} bytes of data", tensor(),
             begin, end, data_size_);
    const auto bits = size_in_bits(type, shape);
    KT_CHECK(bits, "{}: shape {} of {} overflows 64 bits", tensor(), shape_text(shape), type.name);
    KT_CHECK(*bits % 8 == 0, "{}: shape {} of {} is {} bits, wanted whole bytes", tensor(), shape_text(shape),
             type.name, *bits);
    KT_CHECK(end - begin == *bits / 8, "{}: data_offsets [{}, {}] span {} bytes, but {} of {} takes {}",
             tensor(), begin, end, end - begin, shape_text(shape), type.name, *bits / 8);
    rows_.push_back({path().front(), {&type, std::move(shape), data_offset_ + begin, end - begin}});
  }

  const StoredType& checked_type(std::string_view name) const {
    const auto row = std::ranges::find(kTypes, name, &StoredType::name);
    KT_CHECK(row != kTypes.end(), "{}: dtype {} is unknown", tensor(), quote(name));
    return *row;
  }

  std::vector<index_t> checked_shape(const std::vector<std::uint64_t>& stored) const {
    for (const auto n : stored) {
      KT_CHECK(n <= static_cast<std::uint64_t>(std::numeric_limits<index_t>::max()),
               "{}: shape holds {}, wanted less than 2^63", tensor(), n);
    }
    return {stored.begin(), stored.end()};
  }

  // The tensors must tile the data: no overlap, no hole, nothing left over.
  void check_coverage() {
    std::ranges::sort(rows_, {}, [](const Row& row) {
      return std::pair(row.tensor.offset, row.tensor.offset + row.tensor.nbytes);
    });
    std::uint64_t covered = 0;
    const std::string* last = nullptr;
    for (const auto& [name, tensor] : rows_) {
      const std::uint64_t begin = tensor.offset - data_offset_;
      KT_CHECK(begin >= covered,
               "{}: tensors {} and {} overlap: the first ends at {}, the second begins at {}", where(),
               quote(*last), quote(name), covered, begin);
      KT_CHECK(begin == covered, "{}: tensor {} begins at {}, wanted {}: no tensor owns the bytes between",
               where(), quote(name), begin, covered);
      covered = begin + tensor.nbytes;
      last = &name;
    }
    KT_CHECK(covered == data_size_,
             "{}: the tensors end at byte {} of {} bytes of data, wanted no bytes left", where(), covered,
             data_size_);
  }

  std::uint64_t data_offset_, data_size_;
  Fields fields_;
  std::vector<Row> rows_;
};

// Takes weight_map from an index and skips the rest.
class IndexReader final : JsonReader {
 public:
  using JsonReader::JsonReader;

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

// `size` bytes from `offset`.
std::string read_text(const OpenFile& file, std::uint64_t offset, std::uint64_t size) {
  std::string text(to_size(size), '\0');
  file.read(offset, std::as_writable_bytes(std::span(text)));
  return text;
}

}  // namespace

std::span<const StoredType> stored_types() { return kTypes; }

std::optional<std::uint64_t> size_in_bits(const StoredType& type, std::span<const index_t> shape) {
  auto bits = static_cast<std::uint64_t>(type.bits);
  for (const index_t n : shape) {
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(n), &bits)) return std::nullopt;
  }
  return bits;
}

SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_size,
                                           const std::string& where) {
  const std::uint64_t data_offset = kLengthBytes + json.size();
  return {HeaderReader(where, data_offset, data_size).read(json), data_offset};
}

SafetensorsHeader read_safetensors_header(const OpenFile& file) {
  const auto where = quote(file.path().native());
  const std::uint64_t size = file.stamp().size;
  KT_CHECK(size >= kLengthBytes, "{}: {} bytes long, too short for a safetensors file", where, size);
  std::uint64_t length = 0;
  file.read(0, std::as_writable_bytes(std::span(&length, 1)));
  KT_CHECK(length <= kMaxJson, "{}: header length is {}, wanted at most {}", where, length, kMaxJson);
  KT_CHECK(length <= size - kLengthBytes, "{}: header length is {}, but only {} bytes follow", where, length,
           size - kLengthBytes);
  return parse_safetensors_header(read_text(file, kLengthBytes, length), size - kLengthBytes - length, where);
}

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
  KT_CHECK(size <= kMaxJson, "{}: {} bytes long, wanted at most {}", where, size, kMaxJson);
  return parse_weight_map(read_text(file, 0, size), where);
}

}  // namespace kt
