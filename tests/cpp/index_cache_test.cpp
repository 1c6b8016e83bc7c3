#include "weights/index_cache.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "temp_files.h"
#include "weights/checkpoint.h"
#include "weights/table_codec.h"

using namespace kt;
using namespace kt::test;
namespace fs = std::filesystem;

namespace {

class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    ::setenv(name, value.c_str(), 1);
  }
  ~Variable() { old_ ? ::setenv(name_, old_->c_str(), 1) : ::unsetenv(name_); }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> old_;
};

std::string one_tensor(std::string_view name, std::size_t padding) {
  return file_bytes(message("{\"{}\":{\"dtype\":\"U8\",\"shape\":[4],\"data_offsets\":[0,4]}}", name) +
                        std::string(padding, ' '),
                    "1234");
}

// Two shards with headers that are worth a cache, an index, and the cache's directory.
struct Model {
  static constexpr std::size_t large = 1 << 20;

  Model() {
    write(dir / "one.safetensors", one_tensor("a", large));
    write(dir / "two.safetensors", one_tensor("b", large));
    write(index, R"({"weight_map":{"a":"one.safetensors","b":"two.safetensors"}})");
  }

  // The first file now calls its tensor otherwise and looks as it did: who still finds "a" read no header.
  void rename_unnoticed() {
    const auto path = dir / "one.safetensors";
    struct stat info{};
    REQUIRE(::stat(path.c_str(), &info) == 0);
    write(path, one_tensor("A", large));
    const std::array<timespec, 2> times{info.st_atim, info.st_mtim};
    REQUIRE(::utimensat(AT_FDCWD, path.c_str(), times.data(), 0) == 0);
  }

  std::string names() const {
    const Checkpoint checkpoint(dir.path());
    std::string all;
    for (const auto& entry : checkpoint.tensors()) all += entry.name;
    return all;
  }
  bool uses_cache() const {
    try {
      return names() == "ab";
    } catch (const ValueError&) {
      return false;  // the index names "a"
    }
  }
  std::vector<fs::path> cached() const {
    if (!fs::exists(cache / "kt_moe")) return {};
    return {fs::directory_iterator(cache / "kt_moe"), fs::directory_iterator{}};
  }

  TempDir dir, cache;
  fs::path index = dir / "model.safetensors.index.json";
  Variable home{"XDG_CACHE_HOME", cache.path().native()};
  Variable on{"KT_MOE_INDEX_CACHE", ""};
};

std::string bytes_of(const fs::path& path) {
  const OpenFile file(path);
  std::string bytes(file.stamp().size, '\0');
  file.read(0, std::as_writable_bytes(std::span(bytes)));
  return bytes;
}

}  // namespace

TEST_CASE("a large model is read once") {
  const Model model;
  CHECK(model.names() == "ab");
  CHECK(model.cached().size() == 1);
  CHECK(model.uses_cache());
  const Checkpoint checkpoint(model.dir.path());
  const auto* b = checkpoint.find("b");
  REQUIRE(b != nullptr);
  CHECK(b->file->path() == model.dir / "two.safetensors");
  CHECK(b->tensor.type->name == "U8");
  CHECK(b->tensor.shape == std::vector<index_t>{4});
  std::string data(4, ' ');
  checkpoint.read(*b, 0, std::as_writable_bytes(std::span(data)));
  CHECK(data == "1234");
}

TEST_CASE("the cache is used as long as nothing changed, whatever path leads to the directory") {
  Model model;
  model.names();
  model.rename_unnoticed();
  CHECK(model.uses_cache());
  const TempDir elsewhere;
  fs::create_directory_symlink(model.dir.path(), elsewhere / "link");
  const Checkpoint linked(elsewhere / "link");
  REQUIRE(linked.find("a") != nullptr);
  CHECK(linked.find("a")->file->path() == elsewhere / "link/one.safetensors");
  const Variable off("KT_MOE_INDEX_CACHE", "0");
  CHECK_FALSE(model.uses_cache());
}

TEST_CASE("any change of a file or of the index makes it stale") {
  const std::vector<void (*)(const Model&)> changes{
      [](const Model& m) { write(m.dir / "two.safetensors", one_tensor("b", Model::large + 8)); },
      [](const Model& m) {
        write(m.dir / "new", one_tensor("b", Model::large));
        fs::rename(m.dir / "new", m.dir / "two.safetensors");
      },
      [](const Model& m) { fs::last_write_time(m.dir / "two.safetensors", fs::file_time_type{}); },
      [](const Model& m) { fs::last_write_time(m.index, fs::file_time_type{}); },
      [](const Model& m) { write(m.index, R"({"weight_map":{"b":"two.safetensors"}})"); },
      [](const Model& m) { fs::remove(m.index); },
      [](const Model& m) { fs::rename(m.index, m.dir / "other.safetensors.index.json"); },
  };
  for (std::size_t i = 0; i < changes.size(); ++i) {
    CAPTURE(i);
    Model model;
    model.names();
    model.rename_unnoticed();
    REQUIRE(model.uses_cache());
    changes[i](model);
    CHECK_FALSE(model.uses_cache());
  }
}

TEST_CASE("without an index a file that comes or goes makes it stale") {
  const Model model;
  fs::remove(model.index);
  CHECK(model.names() == "ab");
  CHECK(model.cached().size() == 1);
  write(model.dir / "three.safetensors", one_tensor("c", 0));
  CHECK(model.names() == "abc");
  fs::remove(model.dir / "two.safetensors");
  CHECK(model.names() == "ac");
  message_of<NotFoundError>([&] {
    fs::remove(model.dir / "one.safetensors");
    fs::remove(model.dir / "three.safetensors");
    model.names();
  });
}

TEST_CASE("small models, single files and a cache that is off leave nothing behind") {
  const Model model;
  Checkpoint(model.dir / "one.safetensors");
  {
    const Variable off("KT_MOE_INDEX_CACHE", "0");
    model.names();
  }
  write(model.dir / "one.safetensors", one_tensor("a", 0));
  write(model.dir / "two.safetensors", one_tensor("b", Model::large / 2));
  model.names();
  CHECK(model.cached().empty());
}

TEST_CASE("a cache that cannot be written or read is no cache") {
  const Model model;
  write(model.cache / "kt_moe", "a file where the directory should be");
  CHECK(model.names() == "ab");
  fs::remove(model.cache / "kt_moe");
  CHECK(model.names() == "ab");
  const auto file = model.cached().at(0);
  fs::remove(file);
  fs::create_directory(file);
  CHECK(model.names() == "ab");
  CHECK(model.cached().size() == 1);  // no temporary file either
  {
    const Variable relative("XDG_CACHE_HOME", "relative");
    const Variable home("HOME", model.cache.path().native());
    CHECK(model.names() == "ab");
    CHECK_FALSE(fs::exists("relative"));
    CHECK(fs::exists(model.cache / ".cache/kt_moe"));
  }
}

TEST_CASE("damage is noticed and mended") {
  Model model;
  model.names();
  const auto file = model.cached().at(0);
  const auto whole = bytes_of(file);
  model.rename_unnoticed();
  for (const std::size_t n : {std::size_t{0}, std::size_t{20}, whole.size() / 2, whole.size() - 1}) {
    CAPTURE(n);
    auto flipped = whole;
    flipped[n] = static_cast<char>(flipped[n] ^ 0x10);
    write(file, flipped);
    CHECK_FALSE(model.uses_cache());
    write(file, whole.substr(0, n));
    CHECK_FALSE(model.uses_cache());
  }
  write(file, whole + "x");
  CHECK_FALSE(model.uses_cache());
  write(file, whole);
  CHECK(model.uses_cache());
  write(model.dir / "one.safetensors", one_tensor("a", Model::large));
  write(file, "damaged");
  CHECK(model.names() == "ab");
  CHECK(bytes_of(file).size() == whole.size());
}

TEST_CASE("damaged bytes give no table, and a good checksum is not believed either") {
  const fs::path dir = "dir";
  const auto table_of = [&](std::string_view file, std::uint64_t size, std::uint64_t offset,
                            std::vector<std::string_view> names) {
    TensorTable table;
    table.files.emplace_back(dir / file, FileStamp{size, 7, 9});
    for (const auto name : names)
      table.entries.push_back({name, {&stored_types()[0], {2, 3}, offset, 6}, &table.files[0]});
    return encode_table(table, dir, "key");
  };
  const auto good = table_of("f", 106, 100, {"a", "b"});
  const auto decoded = decode_table(good, dir, "key");
  REQUIRE(decoded);
  CHECK(decoded->files[0].path() == dir / "f");
  CHECK(decoded->files[0].stamp() == FileStamp{106, 7, 9});
  CHECK(decoded->entries[1].name == "b");
  CHECK(decoded->entries[1].tensor.nbytes == 6);
  CHECK(encode_table(*decoded, dir, "key") == good);

  for (std::size_t n = 0; n < good.size(); ++n) {
    CAPTURE(n);
    auto flipped = good;
    flipped[n] = static_cast<char>(flipped[n] ^ 0x10);
    CHECK_FALSE(decode_table(flipped, dir, "key"));
    CHECK_FALSE(decode_table(good.substr(0, n), dir, "key"));
  }
  CHECK_FALSE(decode_table(good + "x", dir, "key"));
  CHECK_FALSE(decode_table(good, dir, "other"));
  CHECK_FALSE(decode_table(table_of("f", 105, 100, {"a"}), dir, "key"));
  CHECK_FALSE(decode_table(table_of("f", 106, ~0ull - 2, {"a"}), dir, "key"));
  CHECK_FALSE(decode_table(table_of("f", 106, 100, {"b", "a"}), dir, "key"));
  CHECK_FALSE(decode_table(table_of("f", 106, 100, {"a", "a"}), dir, "key"));
  CHECK_FALSE(decode_table(table_of("../f", 106, 100, {"a"}), dir, "key"));

  // Any byte of the body may be wrong: no table, or one whose tensors lie in their files.
  const auto body = good.substr(table_preamble("").size());
  for (std::size_t n = 0; n < body.size(); ++n) {
    for (const int value : {0, 1, 0x7f, 0x80, 0xff}) {
      auto wrong = body;
      wrong[n] = static_cast<char>(value);
      const auto table = decode_table(table_preamble(wrong) + wrong, dir, "key");
      if (!table) continue;
      for (const auto& [name, tensor, file] : table->entries)
        CHECK(tensor.offset + tensor.nbytes <= file->stamp().size);
    }
    const auto cut = body.substr(0, n);
    CHECK_FALSE(decode_table(table_preamble(cut) + cut, dir, "key"));
  }
}
