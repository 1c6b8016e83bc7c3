// Fuzzes what parses files: the first byte picks safetensors header or model index, the rest is the
// input. Refusals are expected; what is accepted must keep every promise that later code relies on.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string_view>

#include "base/error.h"
#include "weights/safetensors.h"

namespace {

void promise(bool kept) {
  if (!kept) __builtin_trap();
}

// Two bytes of data size, then the JSON text.
void header(std::string_view input) {
  std::uint16_t data_size = 0;
  if (input.size() < sizeof data_size) return;
  std::memcpy(&data_size, input.data(), sizeof data_size);
  input.remove_prefix(sizeof data_size);
  const auto header = kt::parse_safetensors_header(input, data_size, "input");
  std::uint64_t bytes = 0;
  for (const auto& [name, tensor] : header.rows) {
    promise(tensor.offset >= header.data_offset);
    promise(tensor.offset - header.data_offset + tensor.nbytes <= data_size);
    promise(kt::size_in_bits(*tensor.type, tensor.shape) == tensor.nbytes * 8);
    promise(std::ranges::all_of(tensor.shape, [](kt::index_t n) { return n >= 0; }));
    bytes += tensor.nbytes;
  }
  promise(bytes == data_size);
  using Row = kt::SafetensorsHeader::Row;
  promise(std::ranges::adjacent_find(header.rows, std::greater_equal{}, &Row::name) == header.rows.end());
}

void model_index(std::string_view input) {
  const auto map = kt::parse_weight_map(input, "input");
  for (const auto& entry : map) promise(kt::stays_inside(entry.second));
  promise(std::ranges::is_sorted(map));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  constexpr void (*parsers[])(std::string_view) = {header, model_index};
  if (size == 0) return 0;
  const std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);
  try {
    parsers[data[0] % std::size(parsers)](input);
  } catch (const kt::ValueError&) {
  }
  return 0;
}
