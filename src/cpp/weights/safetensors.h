// What safetensors files say of themselves, checked in full: the header of a file (which tensors it holds,
// and where) and the index of a sharded model (*.safetensors.index.json: which file holds which tensor).
// Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/view.h"
#include "weights/data_file.h"

namespace kt {

// An element type of the format.
struct StoredType {
  std::string_view name;
  int bits;
  std::optional<DType> dtype;  // the type we read it as, where we have one
};

// The element types of safetensors 0.8.
std::span<const StoredType> stored_types();

// nullopt when the elements' size in bits does not fit 64 bits.
std::optional<std::uint64_t> size_in_bits(const StoredType& type, std::span<const index_t> shape);

constexpr std::size_t kMaxRank = 64;  // the format has none; NumPy's is 64

struct StoredTensor {
  const StoredType* type;
  std::vector<index_t> shape;
  std::uint64_t offset, nbytes;  // in the file; row-major; any alignment
};

struct SafetensorsHeader {
  struct Row {
    std::string name;
    StoredTensor tensor;
  };
  std::vector<Row> rows;        // in the order of their names
  std::uint64_t data_offset{};  // in the file
};

// Throws IoError, or ValueError for a header that breaks a rule of the format.
SafetensorsHeader read_safetensors_header(const OpenFile& file);

// The same of the JSON text alone, with `data_size` bytes behind it. `where` opens every message.
SafetensorsHeader parse_safetensors_header(std::string_view json, std::uint64_t data_size,
                                           const std::string& where);

// Tensor name -> file name, in the order of the tensors' names.
using WeightMap = std::vector<std::pair<std::string, std::string>>;

// Throws IoError, or ValueError for a malformed index and for a file outside the index's directory.
WeightMap read_weight_map(const OpenFile& file);

// The same of the text alone. `where` opens every message.
WeightMap parse_weight_map(std::string_view json, const std::string& where);

// Only the name decides: a download cache's files are symbolic links that rightly point elsewhere.
bool stays_inside(const std::filesystem::path& relative);

}  // namespace kt
