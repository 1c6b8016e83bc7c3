#include "weights/data_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <string>
#include <system_error>
#include <thread>

#include "base/error.h"
#include "weights/json.h"

namespace kt {
namespace {

std::string subject(const std::filesystem::path& path, std::string_view tensor = {}) {
  const auto file = quote(path.native());
  return tensor.empty() ? file : message("{}: tensor {}", file, quote(tensor));
}

FileStamp stamp_of(const struct stat& info) {
  return {static_cast<std::uint64_t>(info.st_size),
          std::int64_t{info.st_mtim.tv_sec} * 1'000'000'000 + info.st_mtim.tv_nsec, info.st_ino};
}

}  // namespace

void throw_errno(const std::filesystem::path& path, std::string_view did, int error,
                 std::string_view tensor) {
  const auto text = message("{}: {}: {}", subject(path, tensor), did, std::system_category().message(error));
  if (error == ENOENT || error == ENOTDIR) throw NotFoundError(text);
  throw IoError(text);
}

Descriptor::~Descriptor() {
  if (fd_ >= 0) ::close(fd_);
}

void Unmap::operator()(const std::byte* memory) const noexcept {
  ::munmap(const_cast<std::byte*>(memory), bytes);
}

Mapping map_file(int fd, std::size_t bytes, int protection, int flags) {
  void* memory = ::mmap(nullptr, bytes, protection, flags, fd, 0);
  return {memory == MAP_FAILED ? nullptr : static_cast<std::byte*>(memory), Unmap{bytes}};
}

void wait_for_lock(int fd, const std::function<void()>& meanwhile) {
  while (::flock(fd, LOCK_EX | LOCK_NB) != 0 && (errno == EWOULDBLOCK || errno == EINTR)) {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    if (meanwhile) meanwhile();
  }
}

// Four sums of multiplied words: as fast as memory.
std::uint64_t checksum(std::span<const std::byte> bytes) {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio
  const auto mix = [](std::uint64_t sum, std::uint64_t word) {
    return std::rotl(sum ^ word * kOdd, 29) * kOdd;
  };
  std::array<std::uint64_t, 4> sums{1, 2, 3, 4};
  std::array<std::uint64_t, 4> words;
  std::size_t at = 0;
  for (; at + sizeof words <= bytes.size(); at += sizeof words) {
    std::memcpy(&words, bytes.data() + at, sizeof words);
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = mix(sums[i], words[i]);
  }
  words = {};
  std::memcpy(&words, bytes.data() + at, bytes.size() - at);
  std::uint64_t all = bytes.size();
  for (std::size_t i = 0; i < sums.size(); ++i) all = mix(all, mix(sums[i], words[i]));
  return all ^ all >> 32;
}

// O_NONBLOCK: opening a FIFO must not wait for a writer. It means nothing for a regular file.
OpenFile::OpenFile(std::filesystem::path path)
    : path_(std::move(path)), descriptor_(::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
  if (descriptor_ < 0) throw_errno(path_, "cannot open", errno);
  struct stat info{};
  const int error = ::fstat(descriptor_, &info) == 0 ? 0 : errno;
  if (error != 0) throw_errno(path_, "cannot stat", error);
  KT_CHECK(S_ISREG(info.st_mode), "{}: not a regular file", subject(path_));
  stamp_ = stamp_of(info);
}

void OpenFile::read(std::uint64_t offset, std::span<std::byte> to, std::string_view tensor) const {
  const std::uint64_t end = offset + to.size();
  while (!to.empty()) {
    const ssize_t got = ::pread(descriptor_, to.data(), to.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (const int error = errno; got < 0)
      throw_errno(path_, message("cannot read {} bytes at {}", to.size(), offset), error, tensor);
    KT_CHECK(got > 0, "{}: the file was shortened: it ends at byte {}, wanted {}", subject(path_, tensor),
             offset, end);
    offset += static_cast<std::uint64_t>(got);
    to = to.subspan(to_size(got));
  }
}

void OpenFile::read_ahead(std::uint64_t offset, std::uint64_t bytes) const noexcept {
  if (bytes == 0) return;
  std::byte last{};
  iovec to{&last, 1};
  // To ask for what is there already costs a tenth of reading it.
  if (::preadv2(descriptor_, &to, 1, static_cast<off_t>(offset + bytes - 1), RWF_NOWAIT) == 1) return;
  ::posix_fadvise(descriptor_, static_cast<off_t>(offset), static_cast<off_t>(bytes), POSIX_FADV_WILLNEED);
}

std::shared_ptr<const OpenFile> DataFile::open(std::string_view tensor) const {
  auto opened = std::make_shared<const OpenFile>(path_);
  const auto same = [&](std::string_view what, auto found, auto wanted) {
    KT_CHECK(found == wanted, "{}: the file has changed since its header was read: its {} is {}, wanted {}",
             subject(path_, tensor), what, found, wanted);
  };
  const FileStamp& found = opened->stamp();
  same("size", found.size, stamp_.size);
  same("inode", found.inode, stamp_.inode);
  same("time of modification in nanoseconds", found.mtime_ns, stamp_.mtime_ns);
  return opened;
}

std::span<const std::byte> DataFile::map(std::string_view tensor) const {
  auto& [making, file] = mapped_.get();
  const std::lock_guard lock(making);
  if (file == nullptr && stamp_.size > 0) {  // mmap refuses an empty range
    const auto opened = open(tensor);
    file = map_file(opened->descriptor(), to_size(stamp_.size), PROT_READ, MAP_PRIVATE);
    if (file == nullptr) throw_errno(path_, "cannot map the file", errno, tensor);
  }
  return {file.get(), file.get_deleter().bytes};
}

std::shared_ptr<const OpenFile> OpenFiles::open(const DataFile& file, std::string_view tensor) {
  auto& [mutex, uses] = uses_.get();
  const std::lock_guard lock(mutex);
  auto use = std::ranges::find(uses, &file, &Use::file);
  if (use == uses.end()) {
    auto opened = file.open(tensor);
    if (uses.size() == kMostOpen) uses.pop_back();
    uses.push_back({&file, std::move(opened)});
    use = uses.end() - 1;
  }
  std::rotate(uses.begin(), use, use + 1);
  return uses.front().opened;
}

}  // namespace kt
