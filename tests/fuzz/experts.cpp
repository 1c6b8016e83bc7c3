// Fuzzes the expert index over names and shapes: each line of the input is a tensor, "name dtype shape" such
// as "model.layers.0.mlp.experts.gate_up_proj BF16 2,6,4". They become a file with a valid header, which goes
// through the real reader; then every layer is opened, and experts of it are read and looked at in place.
#include <sys/mman.h>
#include <unistd.h>

#include <charconv>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/memory.h"
#include "kernels/registry.h"
#include "weights/checkpoint.h"
#include "weights/expert_index.h"
#include "weights/json.h"

namespace {

constexpr char fill = 0x3f;                   // every byte of data: a scale of any type that is sound
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
    bytes.append(header.data, fill);
    if (descriptor_ < 0 || ::pwrite(descriptor_, bytes.data(), bytes.size(), 0) != std::ssize(bytes))
      std::abort();
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  std::string path() const { return kt::message("/proc/self/fd/{}", descriptor_); }

 private:
  int descriptor_;
};

void want_filled(const std::byte* data, kt::index_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), static_cast<std::size_t>(size));
  if (bytes.find_first_not_of(fill) != bytes.npos) std::abort();
}

// Memory of exactly the promised size can be filled, and all of what is mapped can be read.
void look_at(const kt::LayerSource& source, int expert) {
  const auto kernels = kt::kernel_set("scalar", 0).decode;
  kt::Arena scratch;
  for (const kt::Projection p : kt::projections_of(source.info().gated)) {
    auto m = source.info().matrix(p);
    std::vector<std::byte> codes(m.codes_bytes()), scales(m.scales_bytes()), zeros(m.zeros_bytes());
    std::vector<std::byte> global_scale(m.global_scale_bytes());
    m.codes = codes.data(), m.scales = scales.data(), m.zeros = zeros.data();
    m.global_scale = global_scale.data();
    source.read(expert, p, m, scratch, kernels);
    if (source.info().biases) {
      std::vector<kt::bf16_t> bias(static_cast<std::size_t>(m.rows));
      source.read_bias(expert, p, bias.data(), scratch, kernels);
    }
    if (!source.info().mappable) continue;
    const kt::Weight mapped = source.map(expert, p);
    want_filled(mapped.codes, mapped.codes_bytes());
    want_filled(mapped.scales, mapped.scales_bytes());
    want_filled(mapped.global_scale, mapped.global_scale_bytes());
    want_filled(m.codes, m.codes_bytes());
    want_filled(m.scales, m.scales_bytes());
    want_filled(m.global_scale, m.global_scale_bytes());
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
      const auto source = index->open(layer);
      look_at(*source, 0);
      look_at(*source, source->info().num_experts - 1);
    } catch (const kt::ValueError&) {
    }
  }
  return 0;
}
