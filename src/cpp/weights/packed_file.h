// A layer's weights in a file exactly as memory holds them, behind a header that says whose they are. Mapped
// read-only, so that processes share it; written whole or not at all. docs/formats.md has it byte by byte.
// The file lies on a disk, or is memory without a name (shared_layer.h).
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>

#include "moe/runtime.h"
#include "weights/convert.h"
#include "weights/data_file.h"
#include "weights/layer_memory.h"

namespace kt {

// What a packed layer was made from, and into.
struct PackedLayer {
  LayerShape shape;
  std::uint64_t source = 0;                // fingerprint of the checkpoint's files
  std::optional<QuantErrors> errors = {};  // if it was quantised

  std::size_t bytes() const;  // of the file: header and weights
};

// Writes the header into `file`, of layer.bytes(), before its weights, which are there already; reports 0
// bytes meanwhile.
void write_header(const PackedLayer& layer, std::byte* file, Runtime& runtime, const Report& report);
// The weights of such a file.
std::byte* weights_behind_header(std::byte* file);

class PackedFile {
 public:
  // The layer in `path` as `wanted` describes it, whatever its errors. Empty, with the reason in `why`, for a
  // file that is damaged or holds something else; with none, if there is no file.
  static std::shared_ptr<const PackedFile> open(const std::filesystem::path& path, const PackedLayer& wanted,
                                                std::string& why);
  // The same of an open file, which has `more` bytes behind the weights. IoError names it `path`.
  static std::shared_ptr<const PackedFile> map(int fd, const std::filesystem::path& path,
                                               const PackedLayer& wanted, std::size_t more, std::string& why);

  const PackedLayer& layer() const { return layer_; }
  const std::byte* weights() const;
  // Reads all of it: whether the weights are those that were written.
  bool verify(Runtime& runtime, const Report& report) const;

 private:
  explicit PackedFile(Mapping map) : map_(std::move(map)) {}

  Mapping map_;
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
  std::filesystem::path path_, temporary_;
  std::size_t bytes_;
  Descriptor fd_;
  Mapping map_;
};

}  // namespace kt
