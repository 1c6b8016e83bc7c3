#include "weights/packed_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <functional>
#include <span>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include "base/error.h"
#include "weights/data_file.h"
#include "weights/json.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

constexpr std::array<char, 8> kMagic{'k', 't', 'm', 'o', 'e', 'p', 'k', '\n'};
constexpr std::uint32_t kVersion = 1;
constexpr std::size_t kHeaderBytes = 4096;  // a page, so that the weights begin on one

struct TypeOnDisk {
  std::uint32_t format, scale;
  std::int64_t scale_rows, scale_cols;
  std::uint32_t zero_points, global_scale;
};

struct Header {
  std::array<char, 8> magic;
  std::uint32_t version, quantized;
  std::uint64_t source;
  std::int64_t num_experts, hidden, intermediate;
  std::array<TypeOnDisk, 3> types;
  std::array<std::array<double, 2>, 3> errors;
  std::uint64_t weights_bytes, weights_checksum;
  std::uint64_t checksum;  // of all before it
};
static_assert(std::has_unique_object_representations_v<TypeOnDisk> && sizeof(Header) < kHeaderBytes);

std::uint64_t own_checksum(const Header& header) {
  return checksum({reinterpret_cast<const std::byte*>(&header), offsetof(Header, checksum)});
}

Header header_of(const PackedLayer& layer) {
  const LayerShape& shape = layer.shape;
  Header h{};
  h.magic = kMagic;
  h.version = kVersion;
  h.quantized = layer.errors.has_value();
  h.source = layer.source;
  h.num_experts = shape.num_experts, h.hidden = shape.hidden, h.intermediate = shape.intermediate;
  for (std::size_t i = 0; i < shape.types.size(); ++i) {
    const WeightType& t = shape.types[i];
    h.types[i] = {static_cast<std::uint32_t>(t.format),
                  static_cast<std::uint32_t>(t.scale),
                  t.scale_rows,
                  t.scale_cols,
                  t.zero_points,
                  static_cast<std::uint32_t>(t.global_scale)};
    if (layer.errors) h.errors[i] = {(*layer.errors)[i].error, (*layer.errors)[i].norm};
  }
  h.weights_bytes = static_cast<std::uint64_t>(LayerBlock::whole(shape).bytes());
  return h;
}

// Everything but what only the file can know.
bool same_layer(const Header& a, const Header& b) {
  return a.num_experts == b.num_experts && a.hidden == b.hidden && a.intermediate == b.intermediate &&
         a.quantized == b.quantized && std::memcmp(&a.types, &b.types, sizeof a.types) == 0;
}

// Expert by expert, so that threads share the work.
std::uint64_t weights_checksum(Runtime& runtime, const LayerShape& shape, const std::byte* weights,
                               const Report& report) {
  const auto each = to_size(LayerBlock::whole(shape).expert_bytes());
  std::vector<std::uint64_t> sums(to_size(shape.num_experts));
  Runtime::Lease lease(runtime);
  const auto sum = [&](index_t expert, Arena&) {
    const auto e = to_size(expert);
    sums[e] = checksum({weights + e * each, each});
  };
  std::function<void()> between;
  if (report) between = [&] { report(0); };
  lease.parallel_for(shape.num_experts, sum, between);
  return checksum(std::as_bytes(std::span(sums)));
}

void sync_directory(const fs::path& directory) {
  const Descriptor fd(::open(directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (fd < 0 || ::fsync(fd) != 0) throw_errno(directory, "cannot sync", errno);
}

}  // namespace

std::size_t PackedLayer::bytes() const { return kHeaderBytes + to_size(LayerBlock::whole(shape).bytes()); }

std::byte* weights_behind_header(std::byte* file) { return file + kHeaderBytes; }

void write_header(const PackedLayer& layer, std::byte* file, Runtime& runtime, const Report& report) {
  Header header = header_of(layer);
  header.weights_checksum = weights_checksum(runtime, layer.shape, file + kHeaderBytes, report);
  header.checksum = own_checksum(header);
  std::memcpy(file, &header, sizeof header);
}

std::shared_ptr<const PackedFile> PackedFile::open(const fs::path& path, const PackedLayer& wanted,
                                                   std::string& why) {
  why.clear();
  const Descriptor fd(::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
  if (fd >= 0) return map(fd, path, wanted, 0, why);
  if (errno != ENOENT && errno != ENOTDIR) why = std::system_category().message(errno);
  return nullptr;
}

std::shared_ptr<const PackedFile> PackedFile::map(int fd, const fs::path& path, const PackedLayer& wanted,
                                                  std::size_t more, std::string& why) {
  why.clear();
  const std::size_t bytes = wanted.bytes() + more;
  struct stat info{};
  Header found{};
  if (::fstat(fd, &info) != 0 || !S_ISREG(info.st_mode) ||
      ::pread(fd, &found, sizeof found, 0) != static_cast<ssize_t>(sizeof found) || found.magic != kMagic) {
    why = "it is no packed layer";
    return nullptr;
  }
  const Header want = header_of(wanted);
  if (found.version != kVersion)
    why = message("it has version {}, wanted {}", found.version, kVersion);
  else if (found.checksum != own_checksum(found))
    why = "its header is damaged";
  else if (!same_layer(found, want) || found.weights_bytes != want.weights_bytes)
    why = "it holds a layer of another shape or format";
  else if (found.source != want.source)
    why = "the checkpoint has changed since";
  else if (to_size(info.st_size) != bytes)
    why = message("it has {} bytes, wanted {}", info.st_size, bytes);
  if (!why.empty()) return nullptr;

  Mapping map = map_file(fd, bytes, PROT_READ, MAP_SHARED);
  if (map == nullptr) throw_errno(path, "cannot map the packed layer", errno);
  std::shared_ptr<PackedFile> file(new PackedFile(std::move(map)));
  file->layer_ = wanted;
  file->checksum_ = found.weights_checksum;
  for (std::size_t i = 0; i < found.errors.size() && file->layer_.errors; ++i)
    (*file->layer_.errors)[i] = {found.errors[i][0], found.errors[i][1]};
  return file;
}

const std::byte* PackedFile::weights() const { return map_.get() + kHeaderBytes; }

bool PackedFile::verify(Runtime& runtime, const Report& report) const {
  return weights_checksum(runtime, layer_.shape, weights(), report) == checksum_;
}

PackedWriter::PackedWriter(fs::path path, const LayerShape& shape, const Report& report)
    : path_(std::move(path)),
      temporary_(path_),
      bytes_(kHeaderBytes + to_size(LayerBlock::whole(shape).bytes())) {
  temporary_ += ".part";
  std::error_code error;
  fs::create_directories(path_.parent_path(), error);
  if (error) throw_errno(path_.parent_path(), "cannot make the directory", error.value());
  if (fs::is_directory(path_, error)) throw_errno(path_, "cannot write", EISDIR);
  // What a killed writer left is locked by nobody, and taken over. A name whose file went away meanwhile was
  // its writer's: commit renames it.
  for (;;) {
    fd_ =
        Descriptor(::open(temporary_.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0644));
    if (fd_ < 0) throw_errno(temporary_, "cannot write", errno);
    // Without locks two writers write the same bytes.
    wait_for_lock(fd_, report ? [&] { report(0); } : std::function<void()>());
    struct stat mine{}, named{};
    const bool found = ::fstat(fd_, &mine) == 0 && ::lstat(temporary_.c_str(), &named) == 0;
    if (found && mine.st_ino == named.st_ino && S_ISREG(mine.st_mode) && mine.st_nlink == 1) return;
    // Another file's second name: to write it would be to write that file.
    if (found && mine.st_ino == named.st_ino)
      throw IoError(message("{}: not a file of its own", quote(temporary_.native())));
  }
}

std::byte* PackedWriter::reserve() {
  // Space for all of it now: a full disk would be a signal when the mapping is written.
  const int full = ::posix_fallocate(fd_, 0, static_cast<off_t>(bytes_));
  if (full != 0) throw_errno(temporary_, message("cannot make a file of {} bytes", bytes_), full);
  map_ = map_file(fd_, bytes_, PROT_READ | PROT_WRITE, MAP_SHARED);
  if (map_ == nullptr) throw_errno(temporary_, "cannot map", errno);
  return map_.get() + kHeaderBytes;
}

PackedWriter::~PackedWriter() {
  if (fd_ < 0) return;
  ::unlink(temporary_.c_str());
  ::flock(fd_, LOCK_UN);  // a child that was forked meanwhile has the descriptor, and with it the lock
}

void PackedWriter::commit(const PackedLayer& layer, Runtime& runtime, const Report& report) {
  write_header(layer, map_.get(), runtime, report);
  constexpr std::size_t kChunk = std::size_t{64} << 20;
  for (std::size_t done = 0; done < bytes_; done += kChunk) {
    if (::msync(map_.get() + done, std::min(kChunk, bytes_ - done), MS_SYNC) != 0)
      throw_errno(temporary_, "cannot write", errno);
    if (report) report(0);
  }
  if (::ftruncate(fd_, static_cast<off_t>(bytes_)) != 0 || ::fsync(fd_) != 0 ||
      ::rename(temporary_.c_str(), path_.c_str()) != 0)
    throw_errno(path_, "cannot write", errno);
  ::flock(fd_, LOCK_UN);
  fd_ = Descriptor();
  sync_directory(path_.parent_path());
}

}  // namespace kt
