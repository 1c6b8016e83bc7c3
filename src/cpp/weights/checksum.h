// A fast checksum against damage, not against attackers: four sums of multiplied words, as fast as memory.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>

namespace kt {

inline std::uint64_t checksum(std::span<const std::byte> bytes) {
  constexpr std::uint64_t kOdd = 0x9e3779b97f4a7c15u;  // 2^64 over the golden ratio
  const auto mix = [](std::uint64_t sum, std::uint64_t word) {
    return std::rotl(sum ^ word * kOdd, 29) * kOdd;
  };
  std::array<std::uint64_t, 4> sums{1, 2, 3, 4};
  std::array<std::uint64_t, 4> words;
  std::size_t at = 0;
  for (; at + sizeof words <= bytes.size(); at += sizeof words) {
    std::memcpy(&words, bytes.data() + at, sizeof words);
    for (std::size_t i = 0; i < sums.size(); ++i) sums[i] = mix(sums[i], words[i]);
  }
  words = {};
  std::memcpy(&words, bytes.data() + at, bytes.size() - at);
  std::uint64_t all = bytes.size();
  for (std::size_t i = 0; i < sums.size(); ++i) all = mix(all, mix(sums[i], words[i]));
  return all ^ all >> 32;
}

}  // namespace kt
