#include "weights/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <string_view>
#include <system_error>

#include "base/error.h"
#include "weights/text.h"

namespace kt {
namespace {

[[noreturn]] void throw_errno(const std::filesystem::path& path, std::string_view what, int error) {
  const auto text = message("{}: {}: {}", quote(path.native()), what, std::system_category().message(error));
  if (error == ENOENT || error == ENOTDIR) throw NotFoundError(text);
  throw IoError(text);
}

class Descriptor {
 public:
  // O_NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for a regular file.
  explicit Descriptor(const std::filesystem::path& path)
      : fd_(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (fd_ < 0) throw_errno(path, "cannot open", errno);
  }
  ~Descriptor() { ::close(fd_); }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  operator int() const { return fd_; }

 private:
  int fd_;
};

}  // namespace

MappedFile::MappedFile(const std::filesystem::path& path) {
  const Descriptor fd(path);
  struct stat info{};
  if (::fstat(fd, &info) != 0) throw_errno(path, "cannot stat", errno);
  KT_CHECK(S_ISREG(info.st_mode), "{}: not a regular file", quote(path.native()));
  const auto size = static_cast<std::size_t>(info.st_size);
  if (size == 0) return;  // mmap refuses an empty range
  void* data = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
  if (data == MAP_FAILED) throw_errno(path, "cannot map", errno);
  bytes_ = {static_cast<const std::byte*>(data), size};
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) ::munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

}  // namespace kt
