// A layer's weights in memory that processes of this machine share: one of them loads it, the others map it.
//
// The memory is a packed file without a name (memfd), sealed once it is written, so that nobody can change or
// shorten it. The processes find it by links in a directory, <name>.<process>.<descriptor>, each to the
// descriptor of a process that uses it. So the memory lasts as long as one of them. However they end,
// nothing is left but an empty lock file and links that lead nowhere, which the next process removes.
#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include "weights/data_file.h"
#include "weights/packed_file.h"

namespace kt {

// The right to load a layer, of one process at a time.
class SharedLayer {
 public:
  // `directory` is there, and nobody but this user may write it. `name` says whose layer it is. Waits while
  // another process loads it, reporting 0 bytes meanwhile. IoError.
  SharedLayer(std::filesystem::path directory, std::string name, const Report& report);
  SharedLayer(const SharedLayer&) = delete;
  SharedLayer& operator=(const SharedLayer&) = delete;
  ~SharedLayer();

  // Maps the layer of another process; empty if none has it. `why` says why a layer that was found cannot be
  // used. Removes links of processes that are gone.
  std::shared_ptr<const PackedFile> find(const PackedLayer& wanted, std::string& why) const;

  // Memory for the weights, on all NUMA nodes that have some in turn, on huge pages where the kernel has
  // them. IoError.
  std::byte* reserve(const PackedLayer& layer);
  // Seals what was written there, and lets others find it.
  std::shared_ptr<const PackedFile> commit(const PackedLayer& layer, Runtime& runtime, const Report& report);

 private:
  std::shared_ptr<const PackedFile> publish(Descriptor memfd, std::shared_ptr<const PackedFile> file) const;

  std::filesystem::path directory_;
  std::string name_;
  Descriptor lock_;
  Descriptor memfd_;  // the file that is being written
  Mapping map_;
};

}  // namespace kt
