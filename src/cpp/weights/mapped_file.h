// A whole file, mapped read-only; pages are read when touched. Refuses what is not a regular file.
// As with any mapping, a file that is shortened in place while mapped raises SIGBUS at the next touch.
#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

namespace kt {

class MappedFile {
 public:
  // Throws NotFoundError, IoError, or ValueError for a directory, a FIFO, a device.
  explicit MappedFile(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> bytes() const { return bytes_; }

 private:
  std::span<const std::byte> bytes_;
};

}  // namespace kt
