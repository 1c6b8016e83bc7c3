#include "weights/index_cache.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <exception>
#include <span>
#include <string>
#include <string_view>
#include <system_error>

#include "base/environment.h"
#include "weights/checksum.h"
#include "weights/table_codec.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

constexpr std::uint64_t kLeastHeaders = 1 << 20;  // bytes; reading less takes no noticeable time
constexpr std::uint64_t kMostBytes = 256 << 20;   // bytes of a cache file

std::optional<fs::path> absolute_path(const char* variable) {
  const auto value = environment(variable);
  if (!value || value->front() != '/') return std::nullopt;  // relative ones are to be ignored
  return *value;
}

// https://specifications.freedesktop.org/basedir-spec/latest/
std::optional<fs::path> cache_directory() {
  if (environment("KT_MOE_INDEX_CACHE") == "0") return std::nullopt;
  if (const auto cache = absolute_path("XDG_CACHE_HOME")) return *cache / "kt_moe";
  if (const auto home = absolute_path("HOME")) return *home / ".cache" / "kt_moe";
  return std::nullopt;
}

struct Place {
  fs::path path;
  std::string key;
};

std::optional<Place> place_of(const ModelFiles& model) {
  const auto directory = cache_directory();
  std::error_code error;
  const auto canonical = fs::canonical(model.directory, error);
  if (!directory || error) return std::nullopt;
  std::array<char, 16> name{};
  const auto end =
      std::to_chars(name.begin(), name.end(), checksum(std::as_bytes(std::span(canonical.native()))), 16).ptr;
  const std::string_view digits(name.begin(), end);
  return Place{*directory / (std::string(digits) + ".index"),
               canonical.native() + '\0' + model.index.filename().native()};
}

std::optional<std::string> read_whole(const fs::path& path) try {
  const OpenFile file(path);
  if (file.stamp().size > kMostBytes) return std::nullopt;
  std::string bytes(file.stamp().size, '\0');
  file.read(0, std::as_writable_bytes(std::span(bytes)));
  return bytes;
} catch (const std::exception&) {
  return std::nullopt;
}

bool still_holds(const TensorTable& table, const ModelFiles& model) {
  if (model.index.empty()) {
    if (!std::ranges::equal(table.files, model.files, {}, &DataFile::path)) return false;
  } else if (stamp_of(model.index) != table.index) {
    return false;
  }
  return std::ranges::all_of(table.files,
                             [](const DataFile& file) { return stamp_of(file.path()) == file.stamp(); });
}

bool write_all(int descriptor, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = ::write(descriptor, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<std::size_t>(n));
  }
  return true;
}

// Whoever reads `path` meanwhile, or after a crash, finds all of the bytes or none.
void write_atomically(const fs::path& path, std::string_view bytes) {
  auto temporary = path.native() + ".XXXXXX";
  const int descriptor = ::mkostemp(temporary.data(), O_CLOEXEC);
  if (descriptor < 0) return;
  const bool written = write_all(descriptor, bytes) && ::fsync(descriptor) == 0;
  const bool closed = ::close(descriptor) == 0;
  if (!written || !closed || std::rename(temporary.c_str(), path.c_str()) != 0) ::unlink(temporary.c_str());
}

}  // namespace

std::optional<TensorTable> load_table(const ModelFiles& model) {
  const auto place = place_of(model);
  if (!place) return std::nullopt;
  const auto bytes = read_whole(place->path);
  if (!bytes) return std::nullopt;
  auto table = decode_table(*bytes, model.directory, place->key);
  if (table && !still_holds(*table, model)) table.reset();
  return table;
}

void store_table(const ModelFiles& model, const TensorTable& table) {
  if (table.header_bytes < kLeastHeaders) return;
  const auto place = place_of(model);
  if (!place) return;
  const auto bytes = encode_table(table, model.directory, place->key);
  if (bytes.size() > kMostBytes) return;
  std::error_code error;
  fs::create_directories(place->path.parent_path(), error);
  if (!error) write_atomically(place->path, bytes);
}

}  // namespace kt
