// A TensorTable as bytes, for the index cache. What it decodes was checked in full: damaged bytes give no
// table, and never one with a tensor outside its file.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>

#include "weights/tensor_table.h"

namespace kt {

// `key`, any text, says whose table it is. Every file of the table is in `directory`.
std::string encode_table(const TensorTable& table, const std::filesystem::path& directory,
                         std::string_view key);

// The table with its files in `directory`; nullopt for damaged bytes, another version, another key.
std::optional<TensorTable> decode_table(std::string_view bytes, const std::filesystem::path& directory,
                                        std::string_view key);

// What goes before a body: magic, version, checksum. Tests put it before bodies that are wrong otherwise.
std::string table_preamble(std::string_view body);

}  // namespace kt
