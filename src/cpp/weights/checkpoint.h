// The tensors of a model: one safetensors file, or a directory of them with or without an index.
// Every header is read and checked at construction; the data is read when it is touched. Immutable
// afterwards.
#pragma once

#include <deque>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>

#include "weights/safetensors.h"

namespace kt {

class Checkpoint {
 public:
  struct Entry {
    const StoredTensor* tensor;
    const SafetensorsFile* file;
  };

  // path: a .safetensors file or a directory. Of a directory it reads, in this order, what
  // model.safetensors.index.json names, what the only *.safetensors.index.json names, or all *.safetensors.
  // Throws NotFoundError, IoError, or ValueError for a malformed file, a path in the index that leaves the
  // directory, a tensor that its file lacks, or (without an index) a tensor that two files hold.
  explicit Checkpoint(std::filesystem::path path);
  Checkpoint(const Checkpoint&) = delete;
  Checkpoint& operator=(const Checkpoint&) = delete;

  const std::filesystem::path& path() const { return path_; }
  // In the order of their names.
  const std::deque<SafetensorsFile>& files() const { return files_; }
  const std::map<std::string, Entry, std::less<>>& tensors() const { return tensors_; }

  // nullptr when there is none of that name.
  const StoredTensor* find(std::string_view name) const;

 private:
  void add_directory();
  void add_all(const std::filesystem::path& file);
  void add_indexed(const std::filesystem::path& index);

  std::filesystem::path path_;
  std::deque<SafetensorsFile> files_;  // entries point into it
  std::map<std::string, Entry, std::less<>> tensors_;
};

}  // namespace kt
