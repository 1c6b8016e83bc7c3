// The index of a sharded model (*.safetensors.index.json): which file holds which tensor.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "weights/data_file.h"

namespace kt {

// Tensor name -> file name, in the order of the tensors' names.
using WeightMap = std::vector<std::pair<std::string, std::string>>;

// Throws IoError, or ValueError for a malformed index and for a file outside the index's directory.
WeightMap read_weight_map(const OpenFile& file);

// The same of the text alone. `where` opens every message.
WeightMap parse_weight_map(std::string_view json, const std::string& where);

// Only the name decides: a download cache's files are symbolic links that rightly point elsewhere.
bool stays_inside(const std::filesystem::path& relative);

}  // namespace kt
