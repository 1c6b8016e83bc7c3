// The tensors of a model: one safetensors file, or a directory of them with or without an index.
// Every header is read and checked at construction; the data is read when it is asked for. Immutable
// afterwards, and safe to use from several threads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <filesystem>
#include <mutex>
#include <span>
#include <string_view>
#include <vector>

#include "base/per_process.h"
#include "weights/data_file.h"
#include "weights/safetensors.h"

namespace kt {

// A tensor of a checkpoint.
struct Entry {
  std::string_view name;
  StoredTensor tensor;
  const DataFile* file;
};

// One block for all names: an allocation for each of 100,000 would take most of the time.
struct TensorTable {
  std::deque<DataFile> files;  // in the order of their names; entries point into it
  std::vector<char> names;     // and into this
  std::vector<Entry> entries;  // in the order of their names
};

class Checkpoint {
 public:
  // path: a .safetensors file or a directory. Of a directory it reads, in this order, what
  // model.safetensors.index.json names, what the only *.safetensors.index.json names, or all *.safetensors.
  // Throws NotFoundError, IoError, or ValueError for a malformed file, a path in the index that leaves the
  // directory, a tensor that its file lacks, or (without an index) a tensor that two files hold.
  explicit Checkpoint(std::filesystem::path path);
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  const std::filesystem::path& path() const { return path_; }
  // In the order of their names.
  const std::deque<DataFile>& files() const { return table_.files; }
  std::span<const Entry> tensors() const { return table_.entries; }

  // nullptr when there is none of that name.
  const Entry* find(std::string_view name) const;

  // Bytes [begin, begin + to.size()) of the tensor. Throws ValueError for a range beyond the tensor and for a
  // file that was changed since its header was read (noticed when it is opened again: by its size, inode and
  // time of modification), or that has become too short; NotFoundError, IoError.
  void read(const Entry& entry, std::uint64_t begin, std::span<std::byte> to) const;

  // Has bytes of the tensor read from the disk meanwhile; throws as `read` does for the file.
  void read_ahead(const Entry& entry, std::uint64_t begin, std::uint64_t bytes) const;

  // Throws ValueError, naming it, if one of the files is no longer as it was when its header was read.
  void check_unchanged() const;
  // Of what is stored where: another number when a file has changed, or a tensor is another file's.
  std::uint64_t fingerprint() const;

  // The tensor in a read-only mapping of its file, made at first use and kept as long as the checkpoint
  // lives. Throws as `read` does; whoever touches the bytes of a file that was shortened in place since gets
  // SIGBUS.
  std::span<const std::byte> map(const Entry& entry) const;

 private:
  std::filesystem::path path_;
  TensorTable table_;
  mutable OpenFiles open_files_;
  struct Fingerprint {
    std::once_flag made;
    std::uint64_t value = 0;
  };
  PerProcess<Fingerprint> fingerprint_;  // asked for by every layer
};

}  // namespace kt
