#include "cpu/processor.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string_view>

#include "base/view.h"

namespace kt {

namespace {

struct Leaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

Leaf cpuid(unsigned leaf, unsigned subleaf = 0) {
  Leaf r;
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}

bool bit(unsigned word, int n) { return (word >> n) & 1u; }

// XCR0: which register files the operating system saves at a context switch.
std::uint64_t saved_registers() {
  unsigned low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (std::uint64_t{high} << 32) | low;
}

// What CPUID says of this CPU, and which registers the operating system saves.
struct Processor {
  Leaf one = cpuid(1), seven = cpuid(7), seven_one = cpuid(7, 1);
  std::uint64_t saved = bit(one.ecx, 27) ? saved_registers() : 0;  // OSXSAVE
  bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;
};

// A feature, what /proc/cpuinfo calls its instructions, and whether a CPU has them.
struct Feature {
  std::string_view name;
  std::vector<std::string_view> flags;
  bool (*is_there)(const Processor& cpu);
};

const auto& known_features() {
  static const std::array known{
      Feature{"avx2",
              {"avx2", "fma", "f16c"},
              [](const Processor& cpu) {
                return cpu.ymm && bit(cpu.seven.ebx, 5) && bit(cpu.one.ecx, 12) && bit(cpu.one.ecx, 29);
              }},
      Feature{"avx512",
              {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
              [](const Processor& cpu) {
                return cpu.zmm && bit(cpu.seven.ebx, 16) && bit(cpu.seven.ebx, 17) &&
                       bit(cpu.seven.ebx, 30) && bit(cpu.seven.ebx, 31);
              }},
      Feature{"avx512_bf16",
              {"avx512_bf16"},
              [](const Processor& cpu) { return cpu.zmm && bit(cpu.seven_one.eax, 5); }},
      Feature{
          "amx_bf16",
          {"amx_tile", "amx_bf16"},
          [](const Processor& cpu) { return cpu.tiles && bit(cpu.seven.edx, 22) && bit(cpu.seven.edx, 24); }},
  };
  return known;
}

// The bits of the features for which it is so.
template <class Is>
unsigned bits_of(const Is& is) {
  unsigned bits = 0;
  for (std::size_t i = 0; i < known_features().size(); ++i)
    if (is(known_features()[i])) bits |= 1u << i;
  return bits;
}

}  // namespace

unsigned features_named(std::initializer_list<std::string_view> names) {
  const unsigned bits =
      bits_of([&](const Feature& f) { return std::ranges::find(names, f.name) != names.end(); });
  if (to_size(std::popcount(bits)) != names.size())
    throw std::logic_error("a kernel set needs a feature that cpu/processor.cpp does not know");
  return bits;
}

unsigned cpu_features() {
  const Processor cpu;
  return bits_of([&](const Feature& f) { return f.is_there(cpu); });
}

bool invariant_tsc() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(0x80000007u, &eax, &ebx, &ecx, &edx) != 0 && bit(edx, 8);
}

bool request_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

std::vector<std::string> feature_names(unsigned features) {
  std::vector<std::string> names;
  for (std::size_t i = 0; i < known_features().size(); ++i)
    if (bit(features, to_int(i))) names.emplace_back(known_features()[i].name);
  return names;
}

std::vector<std::string> cpuinfo_flags(unsigned features) {
  std::vector<std::string> flags;
  for (std::size_t i = 0; i < known_features().size(); ++i)
    if (bit(features, to_int(i)))
      flags.insert(flags.end(), known_features()[i].flags.begin(), known_features()[i].flags.end());
  return flags;
}

void stream_zeros(char* to, std::size_t bytes) {
  constexpr std::size_t kVector = sizeof(__m128i);
  const std::size_t head = std::min(bytes, -reinterpret_cast<std::uintptr_t>(to) % kVector);
  std::memset(to, 0, head);
  std::size_t i = head;
  for (; i + kVector <= bytes; i += kVector)
    _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_setzero_si128());
  std::memset(to + i, 0, bytes - i);
  _mm_sfence();
}

}  // namespace kt
