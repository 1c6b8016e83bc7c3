// A layer's weights on disk exactly as memory holds them, behind a header that says whose they are. Mapped
// read-only, so that processes share it; written whole or not at all. docs/formats.md has it byte by byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "moe/runtime.h"
#include "weights/convert.h"
#include "weights/layer_memory.h"

namespace kt {

// What a packed layer was made from, and into.
struct PackedLayer {
  LayerShape shape;
  std::uint64_t source = 0;                // fingerprint of the checkpoint's files
  std::optional<QuantErrors> errors = {};  // if it was quantised
};

class PackedFile {
 public:
  // The layer in `path` as `wanted` describes it, whatever its errors. Empty, with the reason in `why`, for a
  // file that is damaged or holds something else; with none, if there is no file.
  static std::shared_ptr<const PackedFile> open(const std::filesystem::path& path, const PackedLayer& wanted,
                                                std::string& why);
  ~PackedFile();
  PackedFile(const PackedFile&) = delete;
  PackedFile& operator=(const PackedFile&) = delete;

  const PackedLayer& layer() const { return layer_; }
  const std::byte* weights() const;
  // Reads all of it: whether the weights are those that were written.
  bool verify(Runtime& runtime, const Report& report) const;

 private:
  PackedFile(const std::byte* map, std::size_t bytes) : map_(map), bytes_(bytes) {}

  const std::byte* map_;
  std::size_t bytes_;
  std::uint64_t checksum_ = 0;
  PackedLayer layer_;
};

// A packed file in the making, under another name until `commit`. One writer of a path at a time, in all
// processes: the next one waits.
class PackedWriter {
 public:
  // Waits for another writer, reporting 0 bytes meanwhile. IoError if the directory cannot be made or
  // written.
  PackedWriter(std::filesystem::path path, const LayerShape& shape, const Report& report);
  ~PackedWriter();
  PackedWriter(const PackedWriter&) = delete;
  PackedWriter& operator=(const PackedWriter&) = delete;

  // Memory for the weights. IoError if the disk is full.
  std::byte* reserve();
  // Waits until all of it is on the disk, reporting 0 bytes meanwhile. Afterwards `path` is this file.
  void commit(const PackedLayer& layer, Runtime& runtime, const Report& report);

 private:
  void lock(const Report& report) const;

  std::filesystem::path path_, temporary_;
  int fd_ = -1;
  std::byte* map_ = nullptr;
  std::size_t bytes_ = 0;
};

}  // namespace kt
