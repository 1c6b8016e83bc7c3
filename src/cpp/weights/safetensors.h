// One safetensors file: mapped read-only, its header checked in full before any byte is handed out.
// Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstddef>
#include <filesystem>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
#include "base/view.h"
#include "weights/mapped_file.h"

namespace kt {

// An element type of the format.
struct StoredType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;  // the type we read it as, where we have one
};

struct StoredTensor {
  const StoredType* type;
  std::vector<index_t> shape;
  std::span<const std::byte> bytes;  // row-major; any alignment
};

class SafetensorsFile {
 public:
  // Throws NotFoundError, IoError, or ValueError for a header that breaks a rule of the format.
  explicit SafetensorsFile(std::filesystem::path path);

  const std::filesystem::path& path() const { return path_; }
  const std::map<std::string, StoredTensor, std::less<>>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }

 private:
  std::filesystem::path path_;
  MappedFile map_;
  std::map<std::string, StoredTensor, std::less<>> tensors_;
  std::map<std::string, std::string> metadata_;
};

}  // namespace kt
