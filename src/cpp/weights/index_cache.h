// Remembers what the headers of a large model say, so that opening it again reads none of them: a file for
// each model in $XDG_CACHE_HOME/kt_moe or ~/.cache/kt_moe, good as long as the names, sizes, times of
// modification and inodes of the model's files are. Whatever is wrong with it, the headers are read instead,
// and nobody is told. KT_MOE_INDEX_CACHE=0 turns it off.
#pragma once

#include <filesystem>
#include <optional>
#include <vector>

#include "weights/tensor_table.h"

namespace kt {

// What a directory's table is made from.
struct ModelFiles {
  std::filesystem::path directory;
  std::filesystem::path index;               // empty: there is none
  std::vector<std::filesystem::path> files;  // ascending; with an index none: it says which
};

std::optional<TensorTable> load_table(const ModelFiles& model);

// Keeps the table if its headers are large enough to be worth it: small models leave nothing behind.
void store_table(const ModelFiles& model, const TensorTable& table);

}  // namespace kt
