#include "weights/tensor_table.h"

#include <algorithm>
#include <string>
#include <tuple>
#include <utility>

#include "base/error.h"
#include "weights/text.h"
#include "weights/weight_map.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

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

}  // namespace

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
    const auto file = static_cast<std::size_t>(std::ranges::lower_bound(names, name) - names.begin());
    auto& rows = headers[file].rows;
    const auto row = std::ranges::lower_bound(rows, tensor, {}, &SafetensorsHeader::Row::name);
    KT_CHECK(row != rows.end() && row->name == tensor, "{}: tensor {} is not in {}", quote(index.native()),
             quote(tensor), quoted(table.files[file]));
    found.push_back({&*row, file});
  }
  take(found, table);
  return table;
}

}  // namespace kt
