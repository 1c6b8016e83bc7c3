#include "cpu/processor.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace kt {

namespace {

struct Known {
  Feature feature;
  std::string_view name;
  std::vector<std::string_view> flags;
};

const std::array kKnown{
    Known{Feature::avx2, "avx2", {"avx2", "fma", "f16c"}},
    Known{Feature::avx512, "avx512", {"avx512f", "avx512bw", "avx512vl", "avx512dq"}},
    Known{Feature::avx512_bf16, "avx512_bf16", {"avx512_bf16"}},
    Known{Feature::amx_bf16, "amx_bf16", {"amx_tile", "amx_bf16"}},
};

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

}  // namespace

unsigned cpu_features() {
  const Leaf one = cpuid(1), seven = cpuid(7), seven_one = cpuid(7, 1);
  if (!bit(one.ecx, 27)) return 0;  // OSXSAVE
  const std::uint64_t saved = saved_registers();
  const bool ymm = (saved & 0x6) == 0x6, zmm = (saved & 0xe6) == 0xe6, tiles = (saved & 0x60000) == 0x60000;

  unsigned features = 0;
  if (ymm && bit(seven.ebx, 5) && bit(one.ecx, 12) && bit(one.ecx, 29)) features = features | Feature::avx2;
  const bool f_dq_bw_vl =
      bit(seven.ebx, 16) && bit(seven.ebx, 17) && bit(seven.ebx, 30) && bit(seven.ebx, 31);
  if (zmm && f_dq_bw_vl) features = features | Feature::avx512;
  if (zmm && bit(seven_one.eax, 5)) features = features | Feature::avx512_bf16;
  if (tiles && bit(seven.edx, 22) && bit(seven.edx, 24)) features = features | Feature::amx_bf16;
  return features;
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
  for (const Known& known : kKnown)
    if (features & static_cast<unsigned>(known.feature)) names.emplace_back(known.name);
  return names;
}

std::vector<std::string> cpuinfo_flags(unsigned features) {
  std::vector<std::string> flags;
  for (const Known& known : kKnown)
    if (features & static_cast<unsigned>(known.feature))
      flags.insert(flags.end(), known.flags.begin(), known.flags.end());
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
