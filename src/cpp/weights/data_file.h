// Regular files that are read in parts over a long time: what a file was when its header was read is
// remembered, and a file that is another by now is refused, never read as if it were the same.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "base/per_process.h"

namespace kt {

// A fast checksum against damage, not against attackers.
std::uint64_t checksum(std::span<const std::byte> bytes);
inline std::uint64_t checksum(std::string_view text) { return checksum(std::as_bytes(std::span(text))); }

// What a system call that failed on a file makes: NotFoundError or IoError. `tensor` is whom it served.
[[noreturn]] void throw_errno(const std::filesystem::path& path, std::string_view did, int error,
                              std::string_view tensor = {});

// A file descriptor that is closed with its owner; -1: none.
class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  ~Descriptor();
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  operator int() const { return fd_; }

 private:
  int fd_;
};

struct Unmap {
  std::size_t bytes = 0;
  void operator()(const std::byte* memory) const noexcept;
};
// The first bytes of a file in memory; null where the operating system refuses, and errno says why.
using Mapping = std::unique_ptr<std::byte, Unmap>;
Mapping map_file(int fd, std::size_t bytes, int protection, int flags);

// Waits for the exclusive lock of an open file (flock), and calls `meanwhile`, which may be empty, while it
// waits. On file systems without locks it returns at once.
void wait_for_lock(int fd, const std::function<void()>& meanwhile);

// Tells versions of a file apart.
struct FileStamp {
  std::uint64_t size = 0;
  std::int64_t mtime_ns = 0;
  std::uint64_t inode = 0;

  bool operator==(const FileStamp&) const = default;
};

// An open file. `tensor` is whom a call serves, named in messages.
class OpenFile {
 public:
  // Throws NotFoundError, IoError, or ValueError for a directory, a FIFO, a device.
  explicit OpenFile(std::filesystem::path path);

  const std::filesystem::path& path() const { return path_; }
  int descriptor() const { return descriptor_; }
  const FileStamp& stamp() const { return stamp_; }  // when it was opened

  // Fills `to` from `offset`. Throws ValueError where the file ends too early, IoError. Several threads may
  // read at once.
  void read(std::uint64_t offset, std::span<std::byte> to, std::string_view tensor = {}) const;
  // Has the operating system read these bytes from the disk meanwhile, if they are not in memory.
  void read_ahead(std::uint64_t offset, std::uint64_t bytes) const noexcept;

 private:
  std::filesystem::path path_;
  Descriptor descriptor_;
  FileStamp stamp_;
};

// A file by its name, as it was once found. Opened only to be read.
class DataFile {
 public:
  DataFile(std::filesystem::path path, const FileStamp& stamp) : path_(std::move(path)), stamp_(stamp) {}
  const std::filesystem::path& path() const { return path_; }
  const FileStamp& stamp() const { return stamp_; }

  // Throws as OpenFile does, and ValueError if it is another file now.
  std::shared_ptr<const OpenFile> open(std::string_view tensor) const;

  // Throws as `open` does, for the file that has this name now.
  void check_unchanged() const { open({}); }

  // The whole file, mapped read-only by the first call. As with any mapping, a file that is shortened in
  // place afterwards raises SIGBUS at the next touch.
  std::span<const std::byte> map(std::string_view tensor) const;

 private:
  struct Mapped {
    std::mutex making;
    Mapping file;  // none: not made yet
  };

  std::filesystem::path path_;
  FileStamp stamp_;
  PerProcess<Mapped> mapped_;
};

// The files being read at a time: opening one for each read would cost more than a small read, and a large
// model has more files than a process may have open.
class OpenFiles {
 public:
  // Stays open as long as the caller holds it, whatever else is opened meanwhile.
  std::shared_ptr<const OpenFile> open(const DataFile& file, std::string_view tensor);

 private:
  static constexpr std::size_t kMostOpen = 16;  // a layer's tensors lie in a few files

  struct Use {
    const DataFile* file;
    std::shared_ptr<const OpenFile> opened;
  };
  struct Uses {
    std::mutex mutex;
    std::vector<Use> list;  // the latest first
  };
  PerProcess<Uses> uses_;
};

}  // namespace kt
