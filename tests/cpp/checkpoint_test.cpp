#include "weights/checkpoint.h"

#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/error.h"
#include "temp_files.h"

using namespace kt;
using namespace kt::test;
namespace fs = std::filesystem;

namespace {

constexpr auto preferred = "model.safetensors.index.json";

std::string map_of(const std::string& entries) {
  return "{\"metadata\":{\"n\":[1,{}]},\"weight_map\":{" + entries + "}}";
}

std::string refusal(const fs::path& path) {
  return message_of<ValueError>([&] { Checkpoint{path}; });
}

// A directory with tensor "a" in one.safetensors, "b" in two.safetensors, and the index.
struct Sharded {
  explicit Sharded(const std::string& index, const std::string& name = preferred) {
    Writer().add("a", "U8", {2}, 1).write_to(dir / "one.safetensors");
    Writer().add("b", "U8", {3}, 1).add("extra", "U8", {1}, 1).write_to(dir / "two.safetensors");
    write(dir / name, index);
  }
  TempDir dir;
};

const std::string both = R"("a":"one.safetensors","b":"two.safetensors")";

}  // namespace

TEST_CASE("a file is a checkpoint, whatever its name") {
  const TempDir dir;
  const Checkpoint checkpoint(Writer().add("a", "U8", {2}, 1).write_to(dir / "blob"));
  CHECK(checkpoint.path() == dir / "blob");
  CHECK(checkpoint.files().size() == 1);
  REQUIRE(checkpoint.find("a") != nullptr);
  CHECK(checkpoint.find("a")->tensor.nbytes == 2);
  CHECK(checkpoint.find("b") == nullptr);
}

TEST_CASE("an index decides which tensors there are and where") {
  for (const std::string name : {preferred, "other.safetensors.index.json"}) {
    CAPTURE(name);
    const Sharded model(map_of(both), name);
    const Checkpoint checkpoint(model.dir.path());
    CHECK(checkpoint.files().size() == 2);
    CHECK(checkpoint.tensors().size() == 2);
    CHECK(checkpoint.find("extra") == nullptr);
    CHECK(checkpoint.find("b")->file->path().filename() == "two.safetensors");
  }
}

TEST_CASE("without an index every safetensors file counts, and names must not repeat") {
  const TempDir dir;
  Writer().add("a", "U8", {2}, 1).write_to(dir / "one.safetensors");
  Writer().add("b", "U8", {2}, 1).write_to(dir / "two.safetensors");
  write(dir / "config.json", "{}");
  CHECK(Checkpoint(dir.path()).tensors().size() == 2);
  Writer().add("a", "U8", {2}, 1).write_to(dir / "three.safetensors");
  const auto message = refusal(dir.path());
  CHECK(contains(message, "tensor \"a\""));
  CHECK(contains(message, "one.safetensors"));
  CHECK(contains(message, "three.safetensors"));
}

TEST_CASE("the preferred index wins among several; without it they are ambiguous") {
  const Sharded model(map_of(both), "x.safetensors.index.json");
  write(model.dir / "y.safetensors.index.json", "{}");
  CHECK(contains(refusal(model.dir.path()), "several indexes"));
  write(model.dir / preferred, map_of(R"("a":"one.safetensors")"));
  CHECK(Checkpoint(model.dir.path()).tensors().size() == 1);
}

TEST_CASE("an index may not leave its directory") {
  for (const std::string file : {"../x/one.safetensors", "/etc/passwd", "sub/../../one.safetensors", "..", "",
                                 "one.safetensors\\u0000"}) {
    CAPTURE(file);
    const Sharded model(map_of(message("\"a\":\"{}\"", file)));
    CHECK(contains(refusal(model.dir.path()), "wanted a file in the index's directory"));
  }
}

TEST_CASE("an index may name a subdirectory, and files may be symbolic links out of the directory") {
  const TempDir store;
  Writer().add("a", "U8", {2}, 1).write_to(store / "blob");
  const Sharded model(map_of(R"("a":"sub/link.safetensors")"));
  fs::create_directory(model.dir / "sub");
  fs::create_symlink(store / "blob", model.dir / "sub/link.safetensors");
  CHECK(Checkpoint(model.dir.path()).tensors().size() == 1);
}

TEST_CASE("what is no file by name of one is refused, through an index too") {
  struct Hostile {
    std::string says;
    void (*make)(const fs::path&);
  };
  for (const auto& [says, make] : std::vector<Hostile>{
           {"not a regular file", [](const fs::path& path) { fs::create_directory(path); }},
           {"not a regular file", [](const fs::path& path) { REQUIRE(::mkfifo(path.c_str(), 0600) == 0); }},
           {"not a regular file", [](const fs::path& path) { fs::create_symlink("/dev/zero", path); }},
           {"too short", [](const fs::path& path) { fs::create_symlink("/dev/../proc/self/status", path); }},
       }) {
    CAPTURE(says);
    const TempDir dir;
    make(dir / "m.safetensors");
    CHECK(contains(refusal(dir.path()), says));
    write(dir / preferred, map_of(R"("a":"m.safetensors")"));
    CHECK(contains(refusal(dir.path()), says));
    fs::rename(dir / "m.safetensors", dir / "m");
    fs::rename(dir / preferred, dir / "text");
    fs::rename(dir / "m", dir / preferred);
    message_of<ValueError>([&] { Checkpoint{dir.path()}; });
  }
  const TempDir dir;
  fs::create_symlink("two.safetensors", dir / "one.safetensors");
  fs::create_symlink("one.safetensors", dir / "two.safetensors");
  CHECK(contains(message_of<IoError>([&] { Checkpoint{dir.path()}; }), "one.safetensors"));
}

TEST_CASE("any part of a tensor can be read, and nothing beside it") {
  const TempDir dir;
  const Checkpoint checkpoint(
      Writer().add("a", "U8", {5}, 1).add("b", "U8", {7}, 1).write_to(dir / "m.safetensors"));
  const auto* b = checkpoint.find("b");
  REQUIRE(b != nullptr);
  const auto read = [&](std::uint64_t begin, std::size_t n) {
    std::string bytes(n, '?');
    checkpoint.read(*b, begin, std::as_writable_bytes(std::span(bytes)));
    return bytes;
  };
  CHECK(read(0, 7) == "\5\6\7\10\11\12\13");
  CHECK(read(2, 3) == "\7\10\11");
  CHECK(read(7, 0).empty());
  const auto mapped = checkpoint.map(*b);
  CHECK(std::string(reinterpret_cast<const char*>(mapped.data()), mapped.size()) == read(0, 7));
  for (const auto& [begin, n] :
       std::vector<std::pair<std::uint64_t, std::size_t>>{{0, 8}, {7, 1}, {8, 0}, {~0ull, 0}, {~0ull, 2}}) {
    CAPTURE(begin);
    CHECK(contains(message_of<ValueError>([&, at = begin, size = n] { read(at, size); }),
                   "m.safetensors\": tensor \"b\": "));
  }
}

TEST_CASE("a file that was truncated, replaced or removed under an open checkpoint") {
  const TempDir dir;
  const auto path = dir / "m.safetensors";
  std::string bytes(4, '?');
  const auto refused = [&](auto change) {
    Writer().add("a", "U8", {4}, 1).write_to(path);
    const Checkpoint checkpoint(path);
    change();
    const auto message = message_of<ValueError>(
        [&] { checkpoint.read(*checkpoint.find("a"), 0, std::as_writable_bytes(std::span(bytes))); });
    CHECK(contains(message, "m.safetensors\": tensor \"a\": the file "));
    return message;
  };
  CHECK(contains(refused([&] { fs::resize_file(path, 20); }), "its size is 20, wanted"));
  CHECK(contains(refused([&] { write(path, "other"); }), "its size is 5, wanted"));
  CHECK(contains(refused([&] {
                   fs::copy_file(path, dir / "copy");
                   fs::rename(dir / "copy", path);
                 }),
                 "its inode is"));
  Writer().add("a", "U8", {4}, 1).write_to(path);
  const Checkpoint checkpoint(path);
  const auto read = [&] {
    checkpoint.read(*checkpoint.find("a"), 0, std::as_writable_bytes(std::span(bytes)));
  };
  read();
  fs::resize_file(path, fs::file_size(path) - 1);
  CHECK(contains(message_of<ValueError>(read), "the file was shortened"));
  const Checkpoint gone(Writer().add("a", "U8", {4}, 1).write_to(path));
  fs::remove(path);
  message_of<NotFoundError>([&] { gone.map(*gone.find("a")); });
}

TEST_CASE("a file or a tensor that the index names and is not there") {
  const Sharded no_file(map_of(R"("a":"three.safetensors")"));
  CHECK(contains(message_of<NotFoundError>([&] { Checkpoint{no_file.dir.path()}; }), "three.safetensors"));
  const Sharded no_tensor(map_of(R"("zzz":"one.safetensors")"));
  const auto message = refusal(no_tensor.dir.path());
  CHECK(contains(message, "tensor \"zzz\" is not in"));
  CHECK(contains(message, "one.safetensors"));
}

TEST_CASE("an index of the wrong form is refused") {
  const auto refused = [](const std::string& index) { return refusal(Sharded(index).dir.path()); };
  CHECK(contains(refused(""), "syntax error"));
  CHECK(contains(refused("{"), "syntax error"));
  CHECK(contains(refused("[]"), "wanted an object"));
  CHECK(contains(refused("7"), "wanted an object"));
  CHECK(contains(refused("{}"), "no weight_map"));
  CHECK(contains(refused(R"({"weight_map":[]})"), "weight_map is an array"));
  CHECK(contains(refused(R"({"weight_map":null})"), "weight_map is null"));
  CHECK(contains(refused(map_of("\"a\":1")), "weight_map gives a number for \"a\""));
  CHECK(contains(refused(map_of("\"a\":{}")), "no file name for \"a\""));
  CHECK(contains(refused(map_of(both + "," + both)), "duplicate key \"a\""));
  CHECK(contains(refused("{\"metadata\":" + std::string(1'000'000, '[')), "nested deeper"));
  CHECK(contains(refused(map_of(both) + std::string(100'000'000, ' ')), "wanted at most 100000000"));
}

TEST_CASE("paths that are no checkpoint") {
  const TempDir dir;
  message_of<NotFoundError>([&] { Checkpoint{dir / "none"}; });
  message_of<NotFoundError>([&] { Checkpoint{""}; });
  CHECK(contains(message_of<NotFoundError>([&] { Checkpoint{dir.path()}; }), "no .safetensors file"));
  CHECK(contains(refusal("/dev/null"), "not a regular file"));
  CHECK(contains(refusal(write(dir / preferred, "{}")), "an index"));
  fs::remove(dir / preferred);
  fs::create_symlink(dir / "gone", dir / "m.safetensors");
  CHECK(contains(message_of<NotFoundError>([&] { Checkpoint{dir.path()}; }), "m.safetensors"));
  fs::remove(dir / "m.safetensors");
  fs::create_directory(dir / "m.safetensors");
  CHECK(contains(refusal(dir.path()), "not a regular file"));
}

TEST_CASE("a file name that is not UTF-8 gives a printable message") {
  const TempDir dir;
  const auto message = refusal(write(dir / "\xff\xfe.safetensors", "short"));
  CHECK(contains(message, "\xef\xbf\xbd"));
  CHECK_FALSE(contains(message, "\xff"));
}
