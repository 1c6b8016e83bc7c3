#include "weights/checkpoint.h"

#include <algorithm>
#include <system_error>
#include <utility>
#include <vector>

#include "base/error.h"
#include "weights/json_events.h"
#include "weights/mapped_file.h"
#include "weights/text.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view data_suffix = ".safetensors";
constexpr std::string_view index_suffix = ".safetensors.index.json";
constexpr std::string_view preferred_index = "model.safetensors.index.json";
constexpr std::size_t max_index = 100'000'000;  // bytes, as for a header: 91,000 tensors take 10 MB

// Takes weight_map (tensor name -> file name) from an index and skips the rest.
class IndexReader final : JsonEvents {
 public:
  using JsonEvents::JsonEvents;

  std::map<std::string, std::string> read(std::string_view text) {
    parse(text);
    KT_CHECK(found_, "{}: no weight_map", where());
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
    weight_map_.emplace(path()[1], std::move(scalar.text));
  }
  void close() override {}

  bool found_ = false;
  std::map<std::string, std::string> weight_map_;
};

std::map<std::string, std::string> read_index(const fs::path& path) {
  const MappedFile file(path);
  KT_CHECK(file.bytes().size() <= max_index, "{}: {} bytes long, wanted at most {}", quote(path.native()),
           file.bytes().size(), max_index);
  return IndexReader(quote(path.native()))
      .read({reinterpret_cast<const char*>(file.bytes().data()), file.bytes().size()});
}

// Only the name decides: a download cache's files are symbolic links that rightly point elsewhere.
bool stays_inside(const fs::path& relative) {
  return !relative.empty() && relative.is_relative() && std::ranges::find(relative, "..") == relative.end() &&
         relative.native().find('\0') == std::string::npos;
}

[[noreturn]] void throw_system(const fs::path& path, std::string_view what, const std::error_code& error) {
  throw IoError(message("{}: {}: {}", quote(path.native()), what, error.message()));
}

std::vector<fs::path> list(const fs::path& directory) {
  std::error_code error;
  std::vector<fs::path> found;
  for (fs::directory_iterator at(directory, error), end; !error && at != end; at.increment(error)) {
    found.push_back(at->path());
  }
  if (error) throw_system(directory, "cannot list", error);
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
  if (status.type() == fs::file_type::not_found) {
    throw NotFoundError(message("{}: no such file or directory", quote(path.native())));
  }
  if (error) throw_system(path, "cannot stat", error);
  return fs::is_directory(status);
}

}  // namespace

Checkpoint::Checkpoint(fs::path path) : path_(std::move(path)) {
  if (names_directory(path_)) {
    add_directory();
  } else {
    KT_CHECK(!path_.native().ends_with(index_suffix),
             "{}: an index, wanted a .safetensors file or a directory", quote(path_.native()));
    add_all(path_);
  }
}

void Checkpoint::add_directory() {
  const auto paths = list(path_);
  const auto indexes = with_suffix(paths, index_suffix);
  const auto preferred = std::ranges::find(indexes, path_ / preferred_index);
  if (preferred != indexes.end()) return add_indexed(*preferred);
  KT_CHECK(indexes.size() <= 1, "{}: several indexes, such as {} and {}, and none is {}",
           quote(path_.native()), quote(indexes[0].filename().native()),
           quote(indexes[1].filename().native()), preferred_index);
  if (!indexes.empty()) return add_indexed(indexes.front());
  const auto files = with_suffix(paths, data_suffix);
  if (files.empty()) throw NotFoundError(message("{}: no .safetensors file in it", quote(path_.native())));
  for (const auto& file : files) add_all(file);
}

void Checkpoint::add_all(const fs::path& path) {
  const auto& file = files_.emplace_back(path);
  for (const auto& [name, tensor] : file.tensors()) {
    const auto [at, inserted] = tensors_.try_emplace(name, Entry{&tensor, &file});
    KT_CHECK(inserted, "{}: tensor {} is also in {}", quote(file.path().native()), quote(name),
             quote(at->second.file->path().native()));
  }
}

void Checkpoint::add_indexed(const fs::path& index) {
  const auto where = quote(index.native());
  const auto weight_map = read_index(index);
  std::map<std::string, const SafetensorsFile*> opened;
  for (const auto& [name, relative] : weight_map) {
    KT_CHECK(stays_inside(relative), "{}: tensor {} is in {}, wanted a file in the index's directory", where,
             quote(name), quote(relative));
    opened.emplace(relative, nullptr);
  }
  for (auto& [relative, file] : opened) file = &files_.emplace_back(path_ / relative);
  for (const auto& [name, relative] : weight_map) {
    const SafetensorsFile* file = opened.at(relative);
    const auto at = file->tensors().find(name);
    KT_CHECK(at != file->tensors().end(), "{}: tensor {} is not in {}", where, quote(name),
             quote(file->path().native()));
    tensors_.emplace(name, Entry{&at->second, file});
  }
}

const StoredTensor* Checkpoint::find(std::string_view name) const {
  const auto at = tensors_.find(name);
  return at == tensors_.end() ? nullptr : at->second.tensor;
}

}  // namespace kt
