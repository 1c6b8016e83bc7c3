#include "weights/safetensors.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "base/error.h"
#include "weights/json_events.h"
#include "weights/text.h"

namespace kt {
namespace {

static_assert(std::endian::native == std::endian::little, "the format's numbers are read in place");

constexpr std::size_t length_bytes = 8;            // the header's length, before the header
constexpr std::uint64_t max_header = 100'000'000;  // the reference implementation's limit
constexpr std::size_t max_rank = 64;               // the format has none; NumPy's is 64
constexpr std::string_view metadata_key = "__metadata__";

// The element types of safetensors 0.8.
constexpr std::array<StoredType, 22> stored_types{{
    {"BOOL", 8, {}},         {"F4", 4, {}},           {"F6_E2M3", 6, {}},        {"F6_E3M2", 6, {}},
    {"U8", 8, {}},           {"I8", 8, {}},           {"F8_E5M2", 8, {}},        {"F8_E4M3", 8, {}},
    {"F8_E8M0", 8, {}},      {"F8_E4M3FNUZ", 8, {}},  {"F8_E5M2FNUZ", 8, {}},    {"I16", 16, {}},
    {"U16", 16, {}},         {"F16", 16, DType::f16}, {"BF16", 16, DType::bf16}, {"I32", 32, DType::i32},
    {"U32", 32, {}},         {"F32", 32, DType::f32}, {"C64", 64, {}},           {"F64", 64, {}},
    {"I64", 64, DType::i64}, {"U64", 64, {}},
}};

// nullopt when the size in bits does not fit 64 bits.
std::optional<std::uint64_t> size_in_bits(const StoredType& type, std::span<const index_t> shape) {
  auto bits = static_cast<std::uint64_t>(type.bits);
  for (const index_t n : shape) {
    if (__builtin_mul_overflow(bits, static_cast<std::uint64_t>(n), &bits)) return std::nullopt;
  }
  return bits;
}

// Collects the header's tensors and checks each against the size of the data.
class HeaderReader final : JsonEvents {
 public:
  struct Placed {
    std::uint64_t begin, end;
    const std::string* name;
  };

  HeaderReader(std::string file, std::span<const std::byte> data)
      : JsonEvents(std::move(file)), data_(data) {}

  void read(std::string_view header) {
    // nlohmann would skip a byte-order mark; the format wants the brace first.
    KT_CHECK(header.starts_with('{'), "{}: header is not a JSON object: it does not begin with '{'", where());
    parse(header);
    check_coverage();
  }

  std::map<std::string, StoredTensor, std::less<>> tensors;
  std::map<std::string, std::string> metadata;

 private:
  struct Fields {
    std::optional<std::string> dtype;
    std::optional<std::vector<std::uint64_t>> shape, data_offsets;
  };

  bool in_metadata() const { return path().front() == metadata_key; }
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
        KT_CHECK(!in_metadata(), "{}: {} maps {} to {}, wanted a string", where(), metadata_key,
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
      KT_CHECK(scalar.is_string(), "{}: {} maps {} to {}, wanted a string", where(), metadata_key,
               quote(path()[1]), scalar.name());
      metadata.emplace(path()[1], std::move(scalar.text));
    } else if (path().size() == 2) {
      KT_CHECK(path()[1] == "dtype", "{} has {} as its {}, wanted dtype, shape and data_offsets", tensor(),
               scalar.name(), quote(path()[1]));
      KT_CHECK(scalar.is_string(), "{}: dtype is {}, wanted a string", tensor(), scalar.name());
      fields_.dtype = std::move(scalar.text);
    } else {
      KT_CHECK(scalar.is_natural(), "{}: {} holds {}, wanted non-negative integers", tensor(), path()[1],
               scalar.name());
      KT_CHECK(list().size() < max_rank, "{}: {} holds more than {} numbers", tensor(), path()[1], max_rank);
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
    KT_CHECK(begin <= end && end <= data_.size(),
             "{}: data_offsets are [{}, {}], wanted an ordered pair within the {} bytes of data", tensor(),
             begin, end, data_.size());
    const auto bits = size_in_bits(type, shape);
    KT_CHECK(bits, "{}: shape {} of {} overflows 64 bits", tensor(), shape_text(shape), type.name);
    KT_CHECK(*bits % 8 == 0, "{}: shape {} of {} is {} bits, wanted whole bytes", tensor(), shape_text(shape),
             type.name, *bits);
    KT_CHECK(end - begin == *bits / 8, "{}: data_offsets [{}, {}] span {} bytes, but {} of {} takes {}",
             tensor(), begin, end, end - begin, shape_text(shape), type.name, *bits / 8);
    const auto [at, inserted] = tensors.emplace(
        path().front(), StoredTensor{&type, std::move(shape), data_.subspan(begin, end - begin)});
    placed_.push_back({begin, end, &at->first});
  }

  const StoredType& checked_type(std::string_view name) const {
    const auto row = std::ranges::find(stored_types, name, &StoredType::name);
    KT_CHECK(row != stored_types.end(), "{}: dtype {} is unknown", tensor(), quote(name));
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
    std::ranges::sort(placed_, {}, [](const Placed& p) { return std::pair(p.begin, p.end); });
    std::uint64_t covered = 0;
    const std::string* last = nullptr;
    for (const Placed& p : placed_) {
      KT_CHECK(p.begin >= covered,
               "{}: tensors {} and {} overlap: the first ends at {}, the second begins at {}", where(),
               quote(*last), quote(*p.name), covered, p.begin);
      KT_CHECK(p.begin == covered, "{}: tensor {} begins at {}, wanted {}: no tensor owns the bytes between",
               where(), quote(*p.name), p.begin, covered);
      covered = p.end;
      last = p.name;
    }
    KT_CHECK(covered == data_.size(),
             "{}: the tensors end at byte {} of {} bytes of data, wanted no bytes left", where(), covered,
             data_.size());
  }

  std::span<const std::byte> data_;
  Fields fields_;
  std::vector<Placed> placed_;
};

std::string_view header_of(const std::string& file, std::span<const std::byte> bytes) {
  KT_CHECK(bytes.size() >= length_bytes, "{}: {} bytes long, too short for a safetensors file", file,
           bytes.size());
  std::uint64_t length = 0;
  std::memcpy(&length, bytes.data(), length_bytes);
  KT_CHECK(length <= max_header, "{}: header length is {}, wanted at most {}", file, length, max_header);
  KT_CHECK(length <= bytes.size() - length_bytes, "{}: header length is {}, but only {} bytes follow", file,
           length, bytes.size() - length_bytes);
  return {reinterpret_cast<const char*>(bytes.data()) + length_bytes, static_cast<std::size_t>(length)};
}

}  // namespace

SafetensorsFile::SafetensorsFile(std::filesystem::path path) : path_(std::move(path)), map_(path_) {
  const auto file = quote(path_.native());
  const auto header = header_of(file, map_.bytes());
  HeaderReader reader(file, map_.bytes().subspan(length_bytes + header.size()));
  reader.read(header);
  tensors_ = std::move(reader.tensors);
  metadata_ = std::move(reader.metadata);
}

}  // namespace kt
