// The header of a safetensors file: which tensors it holds and where, checked in full against the file.
// Format: https://github.com/huggingface/safetensors#format
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/dtype.h"
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

}  // namespace kt
