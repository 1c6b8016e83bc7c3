// The tensors of a set of safetensors files, from their headers.
#pragma once

#include <deque>
#include <filesystem>
#include <string_view>
#include <vector>

#include "weights/data_file.h"
#include "weights/safetensors.h"

namespace kt {

struct TensorEntry {
  std::string_view name;
  StoredTensor tensor;
  const DataFile* file;
};

// One block for all names: an allocation for each of 100,000 would take most of the time.
struct TensorTable {
  std::deque<DataFile> files;        // in the order of their names; entries point into it
  std::vector<char> names;           // and into this
  std::vector<TensorEntry> entries;  // in the order of their names
};

// Reads the headers of `files`, ascending. Throws NotFoundError, IoError, or ValueError for a malformed file
// or a tensor that two files hold.
TensorTable read_tensors(const std::vector<std::filesystem::path>& files);

// Reads the headers of the files that the index names, which are in its directory, and takes the tensors that
// it names. Throws as above, and ValueError for a malformed index or a tensor that its file lacks.
TensorTable read_indexed_tensors(const std::filesystem::path& index);

}  // namespace kt
