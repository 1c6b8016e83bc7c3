// Fuzzes the expert index over names and shapes: each line of the input is a tensor, "name dtype shape" such
// as "model.layers.0.mlp.experts.gate_up_proj BF16 2,6,4". They become a file of zeros with a valid header,
// which goes through the real reader; then every layer is asked for, and experts of it are looked at.
#include <sys/mman.h>
#include <unistd.h>

#include <charconv>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "weights/checkpoint.h"
#include "weights/expert_index.h"
#include "weights/text.h"

namespace {

constexpr std::uint64_t most_data = 1 << 16;  // bytes; a layer of single elements has few enough experts

// "a,b" gives "a" and leaves "b".
std::string_view take(std::string_view& text, char separator) {
  const auto at = text.find(separator);
  const auto first = text.substr(0, at);
  text.remove_prefix(at == text.npos ? text.size() : at + 1);
  return first;
}

std::vector<kt::index_t> shape_of(std::string_view text) {
  std::vector<kt::index_t> shape;
  while (!text.empty()) {
    const auto word = take(text, ',');
    std::uint32_t n = 0;
    std::from_chars(word.data(), word.data() + word.size(), n);
    shape.push_back(n);
  }
  return shape;
}

// The header of the lines that are tensors, and how many bytes of data belong to it.
struct Header {
  explicit Header(std::string_view lines) {
    while (!lines.empty()) {
      auto line = take(lines, '\n');
      const auto name = take(line, ' '), type_name = take(line, ' ');
      add(name, type_name, shape_of(line));
    }
    json = "{" + json + "}";
  }

  std::string json;
  std::uint64_t data = 0;

 private:
  void add(std::string_view name, std::string_view type_name, const std::vector<kt::index_t>& shape) {
    for (const auto& type : kt::stored_types()) {
      const auto bits = kt::size_in_bits(type, shape);
      if (type.name != type_name || !bits || *bits % 8 != 0 || data + *bits / 8 > most_data) continue;
      json += kt::message("{}{}:{\"dtype\":\"{}\",\"shape\":{},\"data_offsets\":[{},{}]}",
                          json.empty() ? "" : ",", kt::quote(name), type_name, kt::shape_text(shape), data,
                          data + *bits / 8);
      data += *bits / 8;
    }
  }
};

// A file in memory.
class MemoryFile {
 public:
  explicit MemoryFile(const Header& header) : descriptor_(::memfd_create("model", MFD_CLOEXEC)) {
    const std::uint64_t length = header.json.size();
    std::string bytes(reinterpret_cast<const char*>(&length), sizeof length);
    bytes += header.json;
    const auto size = static_cast<off_t>(bytes.size() + header.data);
    if (descriptor_ < 0 || ::pwrite(descriptor_, bytes.data(), bytes.size(), 0) != std::ssize(bytes) ||
        ::ftruncate(descriptor_, size) != 0)
      std::abort();
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return kt::message("/proc/self/fd/{}", descriptor_); }

 private:
  int descriptor_;
};

// All of what an expert's view promises can be read, and is zero.
void look_at(const kt::ExpertIndex& index, int layer, int expert) {
  for (const kt::Projection p : kt::projections) {
    const kt::MatView m = index.expert(layer, expert, p);
    const auto row_bytes = static_cast<std::size_t>(m.cols) * kt::size_of(m.dtype);
    for (kt::index_t row = 0; row < m.rows; ++row) {
      const std::string_view bytes(static_cast<const char*>(m.at(row, 0)), row_bytes);
      if (bytes.find_first_not_of('\0') != bytes.npos) std::abort();
    }
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const MemoryFile file(Header({reinterpret_cast<const char*>(data), size}));
  std::optional<kt::ExpertIndex> index;
  try {
    index.emplace(std::make_shared<const kt::Checkpoint>(file.path()));
  } catch (const kt::ValueError&) {
    return 0;  // a name twice
  }
  for (const int layer : index->layers()) {
    try {
      const int experts = index->layer(layer).num_experts;
      look_at(*index, layer, 0);
      look_at(*index, layer, experts - 1);
    } catch (const kt::ValueError&) {
    }
  }
  return 0;
}
