#include "weights/data_file.h"

#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>

#include <array>
#include <atomic>
#include <deque>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "forks.h"
#include "temp_files.h"

using namespace kt;
using namespace kt::test;
namespace fs = std::filesystem;

namespace {

DataFile found(const fs::path& path) { return {path, OpenFile(path).stamp()}; }

std::string text(const OpenFile& file, std::uint64_t offset, std::size_t n) {
  std::string bytes(n, '?');
  file.read(offset, std::as_writable_bytes(std::span(bytes)), "t");
  return bytes;
}

std::size_t open_descriptors() {
  return static_cast<std::size_t>(
      std::distance(fs::directory_iterator("/proc/self/fd"), fs::directory_iterator{}));
}

void set_mtime(const fs::path& path, std::int64_t ns) {
  const std::array<timespec, 2> times{timespec{0, UTIME_OMIT},
                                      timespec{ns / 1'000'000'000, ns % 1'000'000'000}};
  REQUIRE(::utimensat(AT_FDCWD, path.c_str(), times.data(), 0) == 0);
}

}  // namespace

TEST_CASE("any part of a file can be read, and not a byte more") {
  const TempDir dir;
  const OpenFile file(write(dir / "f", "0123456789"));
  CHECK(file.stamp().size == 10);
  CHECK(text(file, 0, 10) == "0123456789");
  CHECK(text(file, 3, 4) == "3456");
  CHECK(text(file, 10, 0).empty());
  CHECK(contains(message_of<ValueError>([&] { text(file, 8, 4); }),
                 "/f\": tensor \"t\": the file was shortened: it ends at byte 10, wanted 12"));
  CHECK(contains(message_of<IoError>([&] { text(file, ~0ull - 8, 4); }), "cannot read 4 bytes"));
}

TEST_CASE("a file that is another by now is refused") {
  const TempDir dir;
  const auto path = dir / "f";
  const auto refused = [&](auto change) {
    write(path, "0123456789");
    const DataFile file = found(path);
    change();
    const auto reading = message_of<ValueError>([&] { file.open("t"); });
    CHECK(contains(reading, "/f\": tensor \"t\": the file has changed since its header was read: its "));
    CHECK(message_of<ValueError>([&] { file.map("t"); }) == reading);
    return reading;
  };
  CHECK(contains(refused([&] { fs::resize_file(path, 4); }), "size is 4, wanted 10"));
  CHECK(contains(refused([&] { std::ofstream(path, std::ios::app) << "x"; }), "size is 11, wanted 10"));
  CHECK(contains(refused([&] {
                   write(dir / "new", "0123456789");
                   fs::rename(dir / "new", path);
                 }),
                 "inode is"));
  CHECK(contains(refused([&] { set_mtime(path, 1'000'000'007); }),
                 "modification in nanoseconds is 1000000007"));
  const DataFile file = found(write(path, "0123456789"));
  fs::remove(path);
  message_of<NotFoundError>([&] { file.open("t"); });
  fs::create_directory(path);
  CHECK(contains(message_of<ValueError>([&] { file.map("t"); }), "not a regular file"));
}

TEST_CASE("a file that is shortened while it is read is an error, not a signal") {
  const TempDir dir;
  const DataFile file = found(write(dir / "f", std::string(1 << 20, 'x')));
  const auto opened = file.open("t");
  fs::resize_file(file.path(), 1 << 19);
  CHECK(contains(message_of<ValueError>([&] { text(*opened, 0, 1 << 20); }),
                 "it ends at byte 524288, wanted 1048576"));
}

TEST_CASE("a mapping holds the file, also after another took its name") {
  const TempDir dir;
  const DataFile file = found(write(dir / "f", "0123456789"));
  const auto bytes = file.map("t");
  REQUIRE(bytes.size() == 10);
  CHECK(static_cast<char>(bytes[9]) == '9');
  fs::remove(file.path());
  CHECK(file.map("t").data() == bytes.data());
  CHECK(static_cast<char>(bytes[0]) == '0');
  CHECK(found(write(dir / "empty", "")).map("t").empty());
}

TEST_CASE("of many files few stay open, whoever reads them") {
  const TempDir dir;
  std::deque<DataFile> files;
  for (int i = 0; i < 60; ++i) {
    const auto path = write(dir / std::to_string(i), std::to_string(i));
    files.emplace_back(path, OpenFile(path).stamp());
  }
  OpenFiles open_files;
  const auto before = open_descriptors();
  std::atomic<int> wrong = 0;
  std::vector<std::thread> readers;
  for (int r = 0; r < 4; ++r) {
    readers.emplace_back([&, r] {
      for (int i = 0; i < 600; ++i) {
        const int number = (i / 3 + 15 * r) % 60;
        const auto wanted = std::to_string(number);
        const auto file = open_files.open(files[static_cast<std::size_t>(number)], "t");
        if (text(*file, 0, wanted.size()) != wanted) ++wrong;
      }
    });
  }
  for (auto& reader : readers) reader.join();
  CHECK(wrong == 0);
  CHECK(open_descriptors() <= before + 16);
  const auto first = open_files.open(files[0], "t");
  CHECK(open_files.open(files[0], "t") == first);
  CHECK((::fcntl(first->descriptor(), F_GETFD) & FD_CLOEXEC) != 0);
}

TEST_CASE("a child that is forked while another thread opens files") {
  const TempDir dir;
  const DataFile file = found(write(dir / "f", "0123456789"));
  OpenFiles files;
  const auto open = [&] { return text(*files.open(file, "t"), 3, 4) == "3456"; };
  CHECK(true_in_children(open, [&] { open(); }));
}

TEST_CASE("a child that is forked while another thread maps files") {
  const TempDir dir;
  const fs::path path = write(dir / "f", "0123456789");
  const DataFile file = found(path);
  const DataFile gone(dir / "gone", file.stamp());  // tried again by every call
  const auto map = [&](const DataFile& what) { return what.map("t").size() == 10; };
  const auto refused = [&] { return !message_of<NotFoundError>([&] { map(gone); }).empty(); };
  CHECK(true_in_children([&] { return refused() && map(file); }, refused));
}
