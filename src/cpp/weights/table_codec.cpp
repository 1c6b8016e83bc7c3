#include "weights/table_codec.h"

#include <algorithm>
#include <concepts>
#include <cstring>
#include <numeric>
#include <span>
#include <utility>

#include "weights/checksum.h"
#include "weights/weight_map.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

// magic, version, checksum of the body; then the body, all in the machine's byte order:
//   text key; FileStamp of the index; u64 files; for each: text name, FileStamp
//   u64 tensors; for each: Record, rank x i64 shape; the names one after the other
// where a text is its length as u64 and its bytes.
constexpr std::string_view kMagic = "kt_moe\r\n";
constexpr std::uint64_t kVersion = 2;

struct Record {
  std::uint64_t offset;
  std::uint32_t name_bytes, file;
  std::uint16_t type, rank;
  std::uint32_t zero;  // no byte of the file undefined
};

struct Damaged {};

void want(bool condition) {
  if (!condition) throw Damaged();
}

class Writer {
 public:
  template <class T>
  void put(const T& value) {
    static_assert(std::has_unique_object_representations_v<T>);
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void put_text(std::string_view text) {
    put(std::uint64_t{text.size()});
    bytes_ += text;
  }
  void append(std::string_view text) { bytes_ += text; }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : left_(bytes) {}

  template <class T>
  T get() {
    T value;
    std::memcpy(&value, get_bytes(sizeof value).data(), sizeof value);
    return value;
  }
  std::string_view get_bytes(std::uint64_t n) {
    want(n <= left_.size());
    const auto bytes = left_.substr(0, n);
    left_.remove_prefix(n);
    return bytes;
  }
  std::string_view get_text() { return get_bytes(get<std::uint64_t>()); }
  // How many things follow of at least `least` bytes each, so that what is reserved for them is bounded.
  std::size_t get_count(std::size_t least) {
    const auto n = get<std::uint64_t>();
    want(n <= left_.size() / least);
    return n;
  }
  bool done() const { return left_.empty(); }

 private:
  std::string_view left_;
};

StoredTensor get_tensor(Reader& reader, const Record& record, const DataFile& file) {
  want(record.type < stored_types().size() && record.rank <= kMaxRank);
  StoredTensor tensor{&stored_types()[record.type], std::vector<index_t>(record.rank), record.offset, 0};
  for (auto& n : tensor.shape) {
    n = reader.get<index_t>();
    want(n >= 0);
  }
  const auto bits = size_in_bits(*tensor.type, tensor.shape);
  want(bits && *bits % 8 == 0);
  tensor.nbytes = *bits / 8;
  const std::uint64_t size = file.stamp().size;
  want(tensor.offset <= size && tensor.nbytes <= size - tensor.offset);
  return tensor;
}

TensorTable get_table(Reader& reader, const fs::path& directory) {
  TensorTable table;
  table.index = reader.get<FileStamp>();
  const auto files = reader.get_count(sizeof(std::uint64_t) + sizeof(FileStamp));
  for (std::size_t i = 0; i < files; ++i) {
    const fs::path name = reader.get_text();
    want(stays_inside(name));
    table.files.emplace_back(directory / name, reader.get<FileStamp>());
  }
  const auto tensors = reader.get_count(sizeof(Record));
  std::vector<std::uint32_t> lengths;
  lengths.reserve(tensors);
  table.entries.reserve(tensors);
  for (std::size_t i = 0; i < tensors; ++i) {
    const auto record = reader.get<Record>();
    want(record.file < table.files.size() && record.zero == 0);
    const DataFile& file = table.files[record.file];
    table.entries.push_back({{}, get_tensor(reader, record, file), &file});
    lengths.push_back(record.name_bytes);
  }
  const auto names = reader.get_bytes(std::accumulate(lengths.begin(), lengths.end(), std::uint64_t{0}));
  want(reader.done());
  table.names.assign(names.begin(), names.end());
  const char* at = table.names.data();
  for (std::size_t i = 0; i < tensors; ++i) {
    table.entries[i].name = {at, lengths[i]};
    at += lengths[i];
  }
  want(std::ranges::adjacent_find(table.entries, std::greater_equal{}, &TensorEntry::name) ==
       table.entries.end());
  return table;
}

}  // namespace

std::string table_preamble(std::string_view body) {
  Writer writer;
  writer.append(kMagic);
  writer.put(kVersion);
  writer.put(checksum(std::as_bytes(std::span(body))));
  return writer.take();
}

std::string encode_table(const TensorTable& table, const fs::path& directory, std::string_view key) {
  Writer writer;
  writer.put_text(key);
  writer.put(table.index);
  writer.put(std::uint64_t{table.files.size()});
  std::vector<std::pair<const DataFile*, std::uint32_t>> numbers;
  for (const auto& file : table.files) {
    numbers.emplace_back(&file, static_cast<std::uint32_t>(numbers.size()));
    writer.put_text(file.path().lexically_relative(directory).native());
    writer.put(file.stamp());
  }
  std::ranges::sort(numbers, std::less{});
  writer.put(std::uint64_t{table.entries.size()});
  for (const auto& [name, tensor, file] : table.entries) {
    const auto number = std::ranges::lower_bound(numbers, file, std::less{}, [](auto& n) { return n.first; });
    writer.put(Record{tensor.offset, static_cast<std::uint32_t>(name.size()), number->second,
                      static_cast<std::uint16_t>(tensor.type - stored_types().data()),
                      static_cast<std::uint16_t>(tensor.shape.size()), 0});
    for (const index_t n : tensor.shape) writer.put(n);
  }
  for (const auto& entry : table.entries) writer.append(entry.name);
  const auto body = writer.take();
  return table_preamble(body) + body;
}

std::optional<TensorTable> decode_table(std::string_view bytes, const fs::path& directory,
                                        std::string_view key) try {
  constexpr std::size_t kPreamble = kMagic.size() + sizeof kVersion + sizeof(std::uint64_t);
  want(bytes.size() >= kPreamble);
  const auto body = bytes.substr(kPreamble);
  want(bytes.starts_with(table_preamble(body)));
  Reader reader(body);
  want(reader.get_text() == key);
  return get_table(reader, directory);
} catch (const Damaged&) {
  return std::nullopt;
}

}  // namespace kt
