// Decoded codes: every kernel set against the scalar one, bit for bit.
#include <algorithm>
#include <bit>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "base/view.h"
#include "end_of_page.h"
#include "kernel_sets.h"

using namespace kt;

namespace {

struct Codes {
  const char* name;
  CodeType type;
  bool nibbles;
};

constexpr Codes kInt8{"int8", CodeType::int8, false};
constexpr Codes kInt4{"int4", CodeType::int4, true};
constexpr Codes kE4M3{"e4m3", CodeType::e4m3, false};
constexpr Codes kE2M1{"e2m1", CodeType::e2m1, true};
constexpr Codes kAll[] = {kInt8, kInt4, kE4M3, kE2M1};

DecodeCodes* decoder(const DecodeKernels& kernels, const Codes& codes) {
  return kernels.from_codes[static_cast<int>(codes.type)];
}

const DecodeKernels& scalar_decode() {
  static const KernelSet set = kernel_set("scalar", cpu_features());
  return set.decode;
}

bool is_nan(bf16_t x) { return (x & 0x7fff) > 0x7f80; }

// What a set decodes, in rows that have a margin of canaries, the last one ending with its page.
std::vector<bf16_t> decoded(DecodeCodes* decode, const CodedRows& src) {
  constexpr bf16_t kCanary = 0x1234;
  const int stride = src.cols + 3;
  EndOfPage<bf16_t> dst(src.rows * stride - 3);
  std::fill_n(dst.data, src.rows * stride - 3, kCanary);
  decode(src, dst.data, stride);
  std::vector<bf16_t> result;
  for (int i = 0; i < src.rows; ++i) {
    result.insert(result.end(), dst.data + i * stride, dst.data + i * stride + src.cols);
    if (i + 1 < src.rows)
      CHECK(std::count(dst.data + i * stride + src.cols, dst.data + (i + 1) * stride, kCanary) == 3);
  }
  return result;
}

void check_same(const Codes& of, const CodedRows& src) {
  CAPTURE(of.name);
  CAPTURE(src.rows);
  CAPTURE(src.cols);
  CAPTURE(src.group);
  CAPTURE(static_cast<int>(src.scale_type));
  const std::vector<bf16_t> wanted = decoded(decoder(scalar_decode(), of), src);
  for_every_available_set([&](const KernelSet& set) {
    const std::vector<bf16_t> found = decoded(decoder(set.decode, of), src);
    const auto same = [](bf16_t a, bf16_t b) { return a == b || (is_nan(a) && is_nan(b)); };
    const auto [here, there] = std::mismatch(found.begin(), found.end(), wanted.begin(), same);
    if (here == found.end()) return;
    CAPTURE(here - found.begin());
    CHECK(*here == *there);
  });
}

template <class T>
std::vector<T> random_integers(std::size_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<T> values(n);
  for (T& x : values) x = static_cast<T>(random());
  return values;
}

// Every scale with every code: a row has all codes, and a scale (and zero point) of its own.
void check_all_codes(const Codes& of, ScaleType kind, const void* scales, int count, float global_scale = 1,
                     bool divides = false) {
  std::vector<std::uint8_t> codes(256);
  for (std::size_t i = 0; i < codes.size(); ++i) codes[i] = static_cast<std::uint8_t>(i);
  const int cols = of.nibbles ? 512 : 256;
  CodedRows src{count, cols, codes.data(), 0, kind, scales, 1, nullptr, cols, global_scale, divides};
  check_same(of, src);
  if (of.type != CodeType::int4) return;
  const auto zeros = random_integers<std::uint8_t>(static_cast<std::size_t>(count), 1);
  src.zeros = zeros.data();
  check_same(of, src);
}

}  // namespace

TEST_CASE("all codes with scales of all kinds: any sign, denormal, huge, infinite, NaN") {
  std::vector<float> f32;
  std::vector<bf16_t> bf16;
  std::vector<std::uint8_t> e8m0;
  for (unsigned exponent = 0; exponent < 256; ++exponent) {
    e8m0.push_back(static_cast<std::uint8_t>(exponent));
    for (const unsigned mantissa : {0u, 1u, 0x2c3d5bu, 0x55u << 16, 0x7f7fffu, 0x7fffffu})
      for (const unsigned sign : {0u, 1u << 31}) {
        f32.push_back(std::bit_cast<float>(sign | exponent << 23 | mantissa));
        bf16.push_back(static_cast<bf16_t>((sign | exponent << 23 | mantissa) >> 16));
      }
  }
  for (const Codes& of : kAll) {
    check_all_codes(of, ScaleType::f32, f32.data(), static_cast<int>(f32.size()));
    check_all_codes(of, ScaleType::bf16, bf16.data(), static_cast<int>(bf16.size()));
    check_all_codes(of, ScaleType::e8m0, e8m0.data(), static_cast<int>(e8m0.size()));
  }
  std::vector<std::uint8_t> e4m3(256);
  for (std::size_t i = 0; i < e4m3.size(); ++i) e4m3[i] = static_cast<std::uint8_t>(i);
  for (const Codes& of : kAll)
    for (const float global_scale : {1.0f, 0.37f, 3e-42f, 1e-30f, 2e38f})
      for (const bool divides : {false, true})
        check_all_codes(of, ScaleType::e4m3, e4m3.data(), 256, global_scale, divides);
  // One scale a call: above, some scale kept every call from what is faster and takes ordinary ones only.
  for (const Codes& of : {kInt8, kE4M3})
    for (const float& scale : f32) check_all_codes(of, ScaleType::f32, &scale, 1);
}

TEST_CASE("any number of columns, groups and strides; nothing is touched behind a row") {
  const auto scales = random_integers<std::uint32_t>(1000, 2);
  const auto zeros = random_integers<std::uint8_t>(1000, 3);
  std::vector<float> ordinary;
  for (const std::uint32_t x : scales) ordinary.push_back(static_cast<float>(x) * 0x1p-40f);
  for (const Codes& of : kAll)
    for (int cols = 1; cols <= 130; ++cols)
      for (const int group : {32, 64, 128, cols, 7 * cols}) {
        if (group % 32 != 0 && group < cols) continue;
        constexpr int kRows = 3;
        const int row_bytes = of.nibbles ? (cols + 1) / 2 : cols, stride = row_bytes + 5;
        const int bytes = (kRows - 1) * stride + row_bytes;
        EndOfPage<std::uint8_t> codes(bytes);
        const auto random = random_integers<std::uint8_t>(static_cast<std::size_t>(bytes), 4);
        std::copy(random.begin(), random.end(), codes.data);
        const int groups = (cols - 1) / group + 1;
        for (const auto& [kind, from] : {std::pair<ScaleType, const void*>{ScaleType::f32, ordinary.data()},
                                         {ScaleType::f32, scales.data()},
                                         {ScaleType::bf16, scales.data()},
                                         {ScaleType::e8m0, scales.data()}})
          for (const int scale_stride : {0, groups + 1}) {
            check_same(of, {kRows, cols, codes.data, stride, kind, from, scale_stride, nullptr, group});
            if (of.type == CodeType::int4)
              check_same(of,
                         {kRows, cols, codes.data, stride, kind, from, scale_stride, zeros.data(), group});
          }
      }
}

TEST_CASE("groups of 16 columns: codes, scales and what is decoded end with their pages") {
  constexpr int kRows = 3, kGroup = 16;
  for (int cols = 1; cols <= 130; ++cols)
    for (const auto& [kind, size] : {std::pair{ScaleType::e4m3, 1}, {ScaleType::f32, 4}})
      for (const int to_next : {0, 2}) {  // beyond the row's own scales
        const int groups = (cols - 1) / kGroup + 1, row_bytes = (cols + 1) / 2, stride = row_bytes + 5;
        EndOfPage<std::uint8_t> codes((kRows - 1) * stride + row_bytes);
        EndOfPage<std::uint8_t> scales(((kRows - 1) * (groups + to_next) + groups) * size);
        const auto random = random_integers<std::uint8_t>(4096, static_cast<unsigned>(cols));
        std::copy_n(random.begin(), (kRows - 1) * stride + row_bytes, codes.data);
        std::copy_n(random.rbegin(), ((kRows - 1) * (groups + to_next) + groups) * size, scales.data);
        check_same(kE2M1, {kRows, cols, codes.data, stride, kind, scales.data, groups + to_next, nullptr,
                           kGroup, 0.01f, to_next == 0});
      }
}

TEST_CASE("many rows that share the scales of several groups") {
  constexpr int kRows = 70;
  const auto codes = random_integers<std::uint8_t>(kRows * 300, 6);
  const auto scales = random_integers<bf16_t>(10, 7);
  const auto zeros = random_integers<std::uint8_t>(10, 8);
  for (const Codes& of : kAll)
    for (const int cols : {33, 128, 129, 256, 295})
      for (const int group : {32, 64, 128, 512})
        check_same(of, {kRows, cols, codes.data(), 297, ScaleType::bf16, scales.data(), 0,
                        of.type == CodeType::int4 ? zeros.data() : nullptr, group});
}

TEST_CASE("scales and zero points end with their page") {
  constexpr int kRows = 2, kCols = 96, kGroup = 32, kPlaces = 6;
  const auto codes = random_integers<std::uint8_t>(kRows * kCols, 5);
  EndOfPage<std::uint8_t> zeros(kPlaces), e8m0(kPlaces);
  EndOfPage<bf16_t> bf16(kPlaces);
  EndOfPage<float> f32(kPlaces);
  for (int i = 0; i < kPlaces; ++i) {
    zeros.data[i] = static_cast<std::uint8_t>(i);
    e8m0.data[i] = static_cast<std::uint8_t>(120 + i);
    f32.data[i] = 0.1f * static_cast<float>(i);
    bf16.data[i] = to_bf16(f32.data[i]);
  }
  for (const Codes& of : kAll)
    for (const auto& [kind, scales] : {std::pair<ScaleType, const void*>{ScaleType::f32, f32.data},
                                       {ScaleType::bf16, bf16.data},
                                       {ScaleType::e8m0, e8m0.data}})
      check_same(of, {kRows, kCols, codes.data(), of.nibbles ? kCols / 2 : kCols, kind, scales, 3, zeros.data,
                      kGroup});
}
