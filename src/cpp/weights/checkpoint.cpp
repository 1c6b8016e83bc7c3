#include "weights/checkpoint.h"

#include <algorithm>
#include <map>
#include <string>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "base/error.h"
#include "weights/json.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kDataSuffix = ".safetensors";
constexpr std::string_view kIndexSuffix = ".safetensors.index.json";
constexpr std::string_view kPreferredIndex = "model.safetensors.index.json";

std::vector<fs::path> list(const fs::path& directory) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator at(directory, error), end; !error && at != end; at.increment(error)) {
    found.push_back(at->path());
  }
  if (error) throw_errno(directory, "cannot list", error.value());
  std::ranges::sort(found);
  return found;
}

std::vector<fs::path> with_suffix(const std::vector<fs::path>& paths, std::string_view suffix) {
  std::vector<fs::path> found;
  std::ranges::copy_if(paths, std::back_inserter(found),
                       [&](const fs::path& path) { return path.filename().native().ends_with(suffix); });
  return found;
}

bool names_directory(const fs::path& path) {
  std::error_code error;
  const auto status = fs::status(path, error);
  if (status.type() == fs::file_type::not_found)
    throw NotFoundError(message("{}: no such file or directory", quote(path.native())));
  if (error) throw_errno(path, "cannot stat", error.value());
  return fs::is_directory(status);
}

std::string quoted(const DataFile& file) { return quote(file.path().native()); }

std::vector<SafetensorsHeader> read_headers(const std::vector<fs::path>& paths, TensorTable& table) {
  std::vector<SafetensorsHeader> headers;
  for (const auto& path : paths) {
    const OpenFile opened(path);
    headers.push_back(read_safetensors_header(opened));
    table.files.emplace_back(path, opened.stamp());
  }
  return headers;
}

struct Found {
  SafetensorsHeader::Row* row;
  std::size_t file;
};

// `found` is in the order of its names.
void take(const std::vector<Found>& found, TensorTable& table) {
  std::size_t bytes = 0;
  for (const Found& f : found) bytes += f.row->name.size();
  table.names.reserve(bytes);  // once: the views must stay
  table.entries.reserve(found.size());
  for (const Found& f : found) {
    const auto& name = f.row->name;
    const auto at = table.names.insert(table.names.end(), name.begin(), name.end());
    table.entries.push_back({{at, table.names.end()}, std::move(f.row->tensor), &table.files[f.file]});
  }
}

// Reads the headers of `files`, ascending.
TensorTable read_tensors(const std::vector<fs::path>& files) {
  TensorTable table;
  auto headers = read_headers(files, table);
  std::vector<Found> found;
  for (std::size_t file = 0; file < headers.size(); ++file) {
    for (auto& row : headers[file].rows) found.push_back({&row, file});
  }
  std::ranges::sort(found, {}, [](const Found& f) { return std::tie(f.row->name, f.file); });
  const auto twice =
      std::ranges::adjacent_find(found, {}, [](const Found& f) -> auto& { return f.row->name; });
  KT_CHECK(twice == found.end(), "{}: tensor {} is also in {}", quoted(table.files[twice[1].file]),
           quote(twice->row->name), quoted(table.files[twice->file]));
  take(found, table);
  return table;
}

// Reads the headers of the files that the index names, and takes the tensors that it names.
TensorTable read_indexed_tensors(const fs::path& index) {
  const OpenFile opened(index);
  const WeightMap map = read_weight_map(opened);
  std::vector<std::string_view> names;
  for (const auto& [tensor, file] : map) names.push_back(file);
  std::ranges::sort(names);
  names.erase(std::unique(names.begin(), names.end()), names.end());
  std::vector<fs::path> paths;
  for (const auto name : names) paths.push_back(index.parent_path() / name);

  TensorTable table;
  auto headers = read_headers(paths, table);
  std::vector<Found> found;
  found.reserve(map.size());
  for (const auto& [tensor, name] : map) {
    const auto file = to_size(std::ranges::lower_bound(names, name) - names.begin());
    auto& rows = headers[file].rows;
    const auto row = std::ranges::lower_bound(rows, tensor, {}, &SafetensorsHeader::Row::name);
    KT_CHECK(row != rows.end() && row->name == tensor, "{}: tensor {} is not in {}", quote(index.native()),
             quote(tensor), quoted(table.files[file]));
    found.push_back({&*row, file});
  }
  take(found, table);
  return table;
}

// What its index names, or else all safetensors files.
TensorTable read_directory(const fs::path& directory) {
  const auto paths = list(directory);
  const auto indexes = with_suffix(paths, kIndexSuffix);
  const auto preferred = std::ranges::find(indexes, directory / kPreferredIndex);
  if (preferred != indexes.end()) return read_indexed_tensors(*preferred);
  KT_CHECK(indexes.size() <= 1, "{}: several indexes, such as {} and {}, and none is {}",
           quote(directory.native()), quote(indexes[0].filename().native()),
           quote(indexes[1].filename().native()), kPreferredIndex);
  if (!indexes.empty()) return read_indexed_tensors(indexes.front());
  const auto files = with_suffix(paths, kDataSuffix);
  if (files.empty())
    throw NotFoundError(message("{}: no .safetensors file in it", quote(directory.native())));
  return read_tensors(files);
}

TensorTable read_path(const fs::path& path) {
  if (names_directory(path)) return read_directory(path);
  KT_CHECK(!path.native().ends_with(kIndexSuffix), "{}: an index, wanted a .safetensors file or a directory",
           quote(path.native()));
  return read_tensors({path});
}

std::uint64_t fingerprint_of(const TensorTable& table) {
  std::vector<std::uint64_t> numbers;
  std::map<const DataFile*, std::uint64_t> names;
  for (const DataFile& file : table.files) {
    numbers.push_back(names[&file] = checksum(file.path().filename().native()));
    numbers.push_back(file.stamp().size);
    numbers.push_back(static_cast<std::uint64_t>(file.stamp().mtime_ns));
  }
  for (const Entry& entry : table.entries) {
    numbers.push_back(checksum(entry.name));
    numbers.push_back(names.at(entry.file));
    numbers.push_back(entry.tensor.offset);
  }
  return checksum(std::as_bytes(std::span(numbers)));
}

}  // namespace

Checkpoint::Checkpoint(fs::path path) : path_(std::move(path)), table_(read_path(path_)) {}

const Entry* Checkpoint::find(std::string_view name) const {
  const auto at = std::ranges::lower_bound(table_.entries, name, {}, &Entry::name);
  return at == table_.entries.end() || at->name != name ? nullptr : &*at;
}

void Checkpoint::read(const Entry& entry, std::uint64_t begin, std::span<std::byte> to) const {
  const std::uint64_t size = entry.tensor.nbytes;
  KT_CHECK(begin <= size && to.size() <= size - begin,
           "{}: tensor {}: bytes {} to {} were asked for, but it has {}", quote(entry.file->path().native()),
           quote(entry.name), begin, begin + to.size(), size);
  open_files_.open(*entry.file, entry.name)->read(entry.tensor.offset + begin, to, entry.name);
}

void Checkpoint::read_ahead(const Entry& entry, std::uint64_t begin, std::uint64_t bytes) const {
  open_files_.open(*entry.file, entry.name)->read_ahead(entry.tensor.offset + begin, bytes);
}

void Checkpoint::check_unchanged() const {
  for (const DataFile& file : files()) file.check_unchanged();
}

std::uint64_t Checkpoint::fingerprint() const {
  Fingerprint& own = fingerprint_.get();
  std::call_once(own.made, [&, this] { own.value = fingerprint_of(table_); });
  return own.value;
}

std::span<const std::byte> Checkpoint::map(const Entry& entry) const {
  return entry.file->map(entry.name).subspan(entry.tensor.offset, entry.tensor.nbytes);
}

}  // namespace kt
