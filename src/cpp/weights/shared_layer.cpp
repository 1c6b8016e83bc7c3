#include "weights/shared_layer.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <functional>
#include <system_error>
#include <utility>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "cpu/topology.h"

namespace kt {
namespace fs = std::filesystem;
namespace {

constexpr int kSeals = F_SEAL_WRITE | F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL;

// Bytes behind the weights that make the file a whole number of huge pages.
std::size_t padding(const PackedLayer& layer) {
  return to_size(round_up(static_cast<index_t>(layer.bytes()), static_cast<index_t>(kHugePage))) -
         layer.bytes();
}

// A mapped layer with the descriptor and the link by which other processes find it.
struct Published {
  std::shared_ptr<const PackedFile> file;
  Descriptor memfd;
  fs::path link;
  pid_t process = ::getpid();

  ~Published() {  // a forked child has the mapping too, the link is its parent's
    if (!link.empty() && process == ::getpid()) ::unlink(link.c_str());
  }
};

}  // namespace

SharedLayer::SharedLayer(fs::path directory, std::string name, const Report& report)
    : directory_(std::move(directory)), name_(std::move(name)) {
  const fs::path path = directory_ / (name_ + ".lock");
  lock_ = Descriptor(::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (lock_ < 0) throw_errno(path, "cannot open", errno);
  wait_for_lock(lock_, report ? [&] { report(0); } : std::function<void()>());
}

// Closing is not enough: a process that was forked meanwhile has the descriptor too.
SharedLayer::~SharedLayer() { ::flock(lock_, LOCK_UN); }

std::shared_ptr<const PackedFile> SharedLayer::find(const PackedLayer& wanted, std::string& why) const {
  why.clear();
  std::shared_ptr<const PackedFile> file;
  Descriptor of_file;
  std::error_code error;
  for (fs::directory_iterator at(directory_, error), end; !error && at != end; at.increment(error)) {
    std::error_code unknown;
    if (!at->is_symlink(unknown)) continue;
    const auto status = fs::status(at->path(), unknown);
    if (status.type() == fs::file_type::not_found) {  // its process is gone, whatever layer it was
      ::unlink(at->path().c_str());
      continue;
    }
    if (!at->path().filename().native().starts_with(name_ + ".")) continue;
    Descriptor memfd(::open(at->path().c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK));
    if (memfd < 0 && errno == ENXIO) {  // another process has its number, and a socket there
      ::unlink(at->path().c_str());
    } else if (memfd < 0) {
      why = message("{}: {}", at->path().native(), std::system_category().message(errno));
    } else if (file == nullptr && ::fcntl(memfd, F_GET_SEALS) == kSeals) {
      // Without the seals it is a file of another process, which got the same number.
      file = PackedFile::map(memfd, at->path(), wanted, padding(wanted), why);
      if (file != nullptr) of_file = std::move(memfd);
    }
  }
  if (error) throw_errno(directory_, "cannot list", error.value());
  return file == nullptr ? nullptr : publish(std::move(of_file), std::move(file));
}

std::byte* SharedLayer::reserve(const PackedLayer& layer) {
  const std::size_t bytes = layer.bytes() + padding(layer);
  for (const unsigned huge : {unsigned{MFD_HUGETLB}, 0u}) {  // reserved huge pages, if there are enough
    memfd_ = Descriptor(::memfd_create(name_.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING | huge));
    if (memfd_ < 0 || ::ftruncate(memfd_, static_cast<off_t>(bytes)) != 0) continue;
    map_ = map_file(memfd_, bytes, PROT_READ | PROT_WRITE, MAP_SHARED);
    if (map_ != nullptr) break;
  }
  if (map_ == nullptr)
    throw IoError(message("cannot make {} bytes of shared memory for {}: {}", bytes, name_,
                          std::system_category().message(errno)));
  ::madvise(map_.get(), bytes, MADV_DONTFORK);  // a child that could write would keep it from being sealed
  ::madvise(map_.get(), bytes, MADV_HUGEPAGE);  // advice, as is the placement
  std::vector<int> nodes;
  for (const NumaNode& node : read_topology().nodes)
    if (node.has_memory()) nodes.push_back(node.id);
  if (nodes.size() > 1) place_memory(map_.get(), bytes, nodes);
  return weights_behind_header(map_.get());
}

std::shared_ptr<const PackedFile> SharedLayer::commit(const PackedLayer& layer, Runtime& runtime,
                                                      const Report& report) {
  write_header(layer, map_.get(), runtime, report);
  map_.reset();
  std::string why;
  if (::fcntl(memfd_, F_ADD_SEALS, kSeals) != 0) why = std::system_category().message(errno);
  auto file = why.empty() ? PackedFile::map(memfd_, name_, layer, padding(layer), why) : nullptr;
  if (file == nullptr) throw IoError(message("cannot share the memory of {}: {}", name_, why));
  return publish(std::move(memfd_), std::move(file));
}

std::shared_ptr<const PackedFile> SharedLayer::publish(Descriptor memfd,
                                                       std::shared_ptr<const PackedFile> file) const {
  auto published = std::make_shared<Published>();
  published->file = std::move(file);
  published->memfd = std::move(memfd);
  const int fd = published->memfd;
  const fs::path link = directory_ / message("{}.{}.{}", name_, published->process, fd);
  ::unlink(link.c_str());  // of a process that had the same numbers
  const auto target = message("/proc/{}/fd/{}", published->process, fd);
  if (::symlink(target.c_str(), link.c_str()) != 0) throw_errno(link, "cannot make the link", errno);
  published->link = link;
  const PackedFile* mapped = published->file.get();
  return {std::move(published), mapped};
}

}  // namespace kt
