// One tester for every kernel set in the registry that this CPU runs: each kernel against the scalar one.
#include "kernels/registry.h"

#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <numbers>
#include <random>
#include <tuple>
#include <vector>

#include "base/error.h"
#include "base/view.h"
#include "cpu/processor.h"
#include "end_of_page.h"
#include "kernel_sets.h"

using namespace kt;

namespace kt::amx_software {
extern const OwnKernels kernels;
}

namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInf = std::numeric_limits<float>::infinity();

const KernelSet& scalar_set() {
  static const KernelSet set = kernel_set("scalar", cpu_features());
  return set;
}

template <class Body>
void for_every_set(const Body& body) {
  for_every_available_set(body);
  if (availability(kernel_entry("avx512_bf16"), cpu_features()) != "available") return;
  CAPTURE("amx on software tiles");
  KernelSet software = kernel_set("avx512_bf16", cpu_features());  // whose packing it shares
  software.gemm = *amx_software::kernels.gemm;
  body(software);
}

std::vector<float> floats(index_t n, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<std::size_t>(n));
  for (float& x : values) x = normal(random);
  return values;
}

std::vector<bf16_t> bf16s(index_t n, unsigned seed) {
  std::vector<bf16_t> values;
  for (const float x : floats(n, seed)) values.push_back(to_bf16(x));
  return values;
}

// Packed panels live in 64-byte aligned memory, poisoned so that a read of what packing left unwritten shows.
struct Panel {
  Panel(const GemmKernels& gemm, index_t width, index_t k)
      : bytes(static_cast<std::size_t>(width * round_up(k, gemm.k_align) * gemm.element_bytes + 63) / 64 *
              64),
        data(std::aligned_alloc(64, bytes), &std::free) {
    std::memset(data.get(), 0xff, bytes);
  }
  std::size_t bytes;
  std::unique_ptr<void, decltype(&std::free)> data;
};

enum class Direction { forward, backward };

// A [rows, k] * B with B = weight' (forward, weight [cols, k]) or B = weight (backward, weight [k, cols]),
// through the set's own packing. Strides exceed the rows, odd offsets leave nothing aligned, and `index`
// shuffles A.
std::vector<float> product(const KernelSet& set, Direction direction, int rows, int cols, int k,
                           bool accumulate) {
  const GemmKernels& gemm = set.gemm;
  const ptrdiff_t a_stride = k + 3, w_stride = (direction == Direction::forward ? k : cols) + 5;
  const int w_rows = direction == Direction::forward ? cols : k;
  std::vector<bf16_t> a = bf16s(1 + rows * a_stride, 1), w = bf16s(1 + w_rows * w_stride, 2);
  std::vector<std::int32_t> index;
  for (int i = 0; i < rows; ++i) index.push_back(i * 7 % rows);

  // k in two batch, as a product with LoRA has it.
  std::vector<std::unique_ptr<Panel>> panels;
  std::vector<BatchElement> batch;
  for (const auto& [begin, end] : {std::pair{0, k / 2}, std::pair{k / 2, k}}) {
    const int depth = end - begin;
    if (depth == 0) continue;
    const auto take = [&](int width) {
      return panels.emplace_back(std::make_unique<Panel>(gemm, width, depth))->data.get();
    };
    void *pa = take(gemm.mr), *pb = take(gemm.nr);
    gemm.pack_a({a.data() + 1 + begin, a_stride, index.data()}, rows, depth, pa);
    if (direction == Direction::forward)
      gemm.pack_b_cols({w.data() + 1 + begin, w_stride, nullptr}, cols, depth, pb);
    else
      gemm.pack_b_rows({w.data() + 1 + begin * w_stride, w_stride, nullptr}, depth, cols, pb, 0);
    batch.push_back({pa, pb, 0, depth, {}});
  }

  const index_t ldc = gemm.nr + 2;
  std::vector<float> c = floats((rows + 1) * ldc, 3);  // one row of canary behind the result
  const std::vector<float> before = c;
  if (gemm.begin != nullptr) gemm.begin();
  gemm.micro_kernel(rows, cols, batch.data(), static_cast<int>(batch.size()), c.data(), ldc, accumulate);
  if (gemm.end != nullptr) gemm.end();
  for (index_t j = 0; j < ldc; ++j)
    CHECK(c[static_cast<std::size_t>(rows * ldc + j)] == before[static_cast<std::size_t>(rows * ldc + j)]);

  std::vector<float> result;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      const auto place = static_cast<std::size_t>(i * ldc + j);
      result.push_back(c[place] - (accumulate ? before[place] : 0.0f));
    }
  return result;
}

// The same in double, straight from the definition.
std::vector<float> exact_product(Direction direction, int rows, int cols, int k) {
  const ptrdiff_t a_stride = k + 3, w_stride = (direction == Direction::forward ? k : cols) + 5;
  const int w_rows = direction == Direction::forward ? cols : k;
  const std::vector<bf16_t> a = bf16s(1 + rows * a_stride, 1), w = bf16s(1 + w_rows * w_stride, 2);
  std::vector<float> result;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < cols; ++j) {
      double sum = 0;
      for (int p = 0; p < k; ++p) {
        const ptrdiff_t place = direction == Direction::forward ? j * w_stride + p : p * w_stride + j;
        sum += double{to_float(a[static_cast<std::size_t>(1 + i * 7 % rows * a_stride + p)])} *
               to_float(w[static_cast<std::size_t>(1 + place)]);
      }
      result.push_back(static_cast<float>(sum));
    }
  return result;
}

void check_close(const std::vector<float>& result, const std::vector<float>& truth, double tolerance) {
  REQUIRE(result.size() == truth.size());
  for (std::size_t i = 0; i < truth.size(); ++i) {
    CAPTURE(i);
    CHECK(std::abs(result[i] - truth[i]) <= tolerance);
  }
}

void check_same_bf16(bf16_t ours, bf16_t truth, int steps) {
  if (std::isnan(to_float(truth))) {
    CHECK(std::isnan(to_float(ours)));
  } else if (ours != truth) {
    const auto order = [](bf16_t x) { return x & 0x8000 ? -(x & 0x7fff) : x & 0x7fff; };
    CHECK(std::abs(order(ours) - order(truth)) <= steps);
  }
}

}  // namespace

TEST_CASE("a product of packed panels, every tile height and width, odd k, unaligned strides") {
  for_every_set([](const KernelSet& set) {
    for (const Direction direction : {Direction::forward, Direction::backward})
      for (int rows = 1; rows <= set.gemm.mr; ++rows)
        for (const int cols : {1, 2, 7, set.gemm.nr / 2, set.gemm.nr / 2 + 1, set.gemm.nr - 1, set.gemm.nr})
          for (const int k : {1, 2, 3, 15, 16, 17, 31, 32, 33, 100}) {
            CAPTURE(rows);
            CAPTURE(cols);
            CAPTURE(k);
            const std::vector<float> truth = exact_product(direction, rows, cols, k);
            check_close(product(set, direction, rows, cols, k, false), truth, 1e-5 * std::sqrt(k) + 1e-6);
            check_close(product(set, direction, rows, cols, k, true), truth, 1e-5 * std::sqrt(k) + 1e-5);
          }
  });
}

TEST_CASE("rows multiplied where they lie give the bits of a panel, and are read no further") {
  for_every_set([](const KernelSet& set) {
    const GemmKernels& gemm = set.gemm;
    if (!gemm.in_place) return;
    for (int rows = 1; rows <= gemm.mr; ++rows)
      for (const int k : {2, 30, 32, 34, 64, 100}) {
        CAPTURE(rows);
        CAPTURE(k);
        const index_t stride = k + 3;
        const std::vector<bf16_t> w = bf16s(gemm.nr * k, 2), values = bf16s(rows * stride, 1);
        const EndOfPage<bf16_t> a(static_cast<int>((rows - 1) * stride + k));
        std::copy_n(values.begin(), (rows - 1) * stride + k, a.data);
        const Panel pa(gemm, gemm.mr, k), pb(gemm, gemm.nr, k);
        gemm.pack_a({a.data, stride, nullptr}, rows, k, pa.data.get());
        gemm.pack_b_cols({w.data(), k, nullptr}, gemm.nr, k, pb.data.get());
        const BatchElement panel{pa.data.get(), pb.data.get(), 0, k, {}},
            lying{a.data, pb.data.get(), 2 * stride, k, {}};
        std::vector<float> packed(static_cast<std::size_t>(rows * gemm.nr)), in_place = packed;
        const auto product = [&](std::vector<BatchElement> batch, int accumulate, std::vector<float>& c) {
          if (gemm.begin != nullptr) gemm.begin();
          gemm.micro_kernel(rows, gemm.nr, batch.data(), static_cast<int>(batch.size()), c.data(), gemm.nr,
                            accumulate);
          if (gemm.end != nullptr) gemm.end();
        };
        product({panel}, 0, packed);
        product({lying}, 0, in_place);
        CHECK(in_place == packed);
        product({panel, panel}, 1, packed);  // W where it lies, and LoRA B of an odd rank in panels
        product({lying, panel}, 1, in_place);
        CHECK(in_place == packed);
      }
  });
}

TEST_CASE("the multiply-add alone does as many as it says") {
  for_every_set([](const KernelSet& set) {
    if (set.gemm.peak == nullptr) return;
    constexpr std::size_t kWords = kPeakBytes / sizeof(float);
    alignas(64) float registers[kWords];
    const std::uint32_t pair_of_ones = 0x3f803f80;  // as fp32 1.0020
    for (float& word : registers) std::memcpy(&word, &pair_of_ones, sizeof word);
    const double before = double{registers[0]} * kWords;
    const auto call = [](void (*step)()) {
      if (step != nullptr) step();
    };
    call(set.gemm.begin);
    const double done = set.gemm.peak(100, registers);
    call(set.gemm.end);
    double sum = 0;
    for (const float word : registers) sum += word;
    CHECK(done >= 100 * 2 * 8);
    CHECK((sum - before) * 2 == doctest::Approx(done).epsilon(0.01));
  });
}

TEST_CASE("packing reads nothing but its rows: a NaN beside them stays out") {
  for_every_set([](const KernelSet& set) {
    const GemmKernels& gemm = set.gemm;
    const int k = 5, cols = 3;
    std::vector<bf16_t> a(static_cast<std::size_t>(k + 64), to_bf16(kNan)), w(64 * 8, to_bf16(kNan));
    for (int p = 0; p < k; ++p) a[static_cast<std::size_t>(p)] = to_bf16(1.0f);
    for (int p = 0; p < k; ++p)
      for (int j = 0; j < cols; ++j) w[static_cast<std::size_t>(p * 8 + j)] = to_bf16(2.0f);
    const Panel pa(gemm, gemm.mr, k), pb(gemm, gemm.nr, k);
    gemm.pack_a({a.data(), 64, nullptr}, 1, k, pa.data.get());
    gemm.pack_b_rows({w.data(), 8, nullptr}, k, cols, pb.data.get(), 0);
    std::vector<float> c(static_cast<std::size_t>(gemm.nr));
    if (gemm.begin != nullptr) gemm.begin();
    const BatchElement element{pa.data.get(), pb.data.get(), 0, k, {}};
    gemm.micro_kernel(1, cols, &element, 1, c.data(), gemm.nr, 0);
    if (gemm.end != nullptr) gemm.end();
    for (int j = 0; j < cols; ++j) CHECK(c[static_cast<std::size_t>(j)] == 10.0f);
  });
}

TEST_CASE("kernels read and write no byte beyond their operands, not even where the next page is missing") {
  for_every_set([](const KernelSet& set) {
    const GemmKernels& gemm = set.gemm;
    for (const int n : {1, 7, 8, 9, 15, 16, 17, 31, 32}) {
      CAPTURE(n);
      const EndOfPage<bf16_t> a(n), b(n), c(n), d(n), e(n);
      const EndOfPage<float> x(n), y(n), z(n);
      const Panel panel(gemm, std::max(gemm.mr, gemm.nr), 32);
      const int rows = std::min(n, gemm.mr), cols = std::min(n, gemm.nr);
      gemm.pack_a({a.data, 1, nullptr}, rows, 1,
                  panel.data.get());  // rows of one element, one behind the other
      gemm.pack_a({a.data, n, nullptr}, 1, n, panel.data.get());
      gemm.pack_b_cols({a.data, 1, nullptr}, cols, 1, panel.data.get());
      gemm.pack_b_cols({a.data, n, nullptr}, 1, n, panel.data.get());
      gemm.pack_b_rows({a.data, 1, nullptr}, n, 1, panel.data.get(), 0);
      if (n <= gemm.nr) gemm.pack_b_rows({a.data, n, nullptr}, 1, n, panel.data.get(), 0);
      set.epilogue.transpose(x.data, n, 1, n, y.data, 1);
      set.epilogue.transpose(x.data, 1, n, 1, y.data, n);
      const float *terms[]{x.data, z.data}, scales[]{1.0f, 2.0f};
      set.epilogue.sum_scaled(n, 2, terms, scales, y.data);
      set.epilogue.round_scaled(n, 1.0f, x.data, a.data);
      for (int activation = 0; activation < kActivationCount; ++activation) {
        const ActivationKernels& kernels = set.epilogue.activations->gated[activation];
        kernels.forward(n, x.data, y.data, a.data, b.data, c.data);
        kernels.backward(n, z.data, 1.0f, a.data, b.data, c.data, d.data, e.data);
      }
      set.decode.from_f32(n, x.data, a.data);
      set.decode.from_f16(n, a.data, b.data);
    }
  });
}

TEST_CASE(
    "panels packed from rows in one call are those packed one by one, and their source is read no further") {
  for_every_set([](const KernelSet& set) {
    const GemmKernels& gemm = set.gemm;
    for (const int k : {1, 2, 7, 36, 41})
      for (const int panels : {1, 2, 3, 4, 5, 9})
        for (const int cols : {panels * gemm.nr - gemm.nr + 1, panels * gemm.nr - 3, panels * gemm.nr}) {
          CAPTURE(k);
          CAPTURE(cols);
          std::vector<std::int32_t> index;
          for (int p = 0; p < k; ++p) index.push_back(k - 1 - p);
          const std::vector<bf16_t> values = bf16s(k * cols, 10);
          const EndOfPage<bf16_t> source(k * cols);
          std::copy(values.begin(), values.end(), source.data);

          const Panel together(gemm, panels * gemm.nr, k), single(gemm, gemm.nr, k);
          const auto panel_bytes = together.bytes / static_cast<std::size_t>(panels);
          gemm.pack_b_rows({source.data, cols, index.data()}, k, cols, together.data.get(),
                           static_cast<ptrdiff_t>(panel_bytes));
          for (int i = 0; i < panels; ++i) {
            std::memset(single.data.get(), 0xff, single.bytes);
            gemm.pack_b_rows({source.data + i * gemm.nr, cols, index.data()}, k,
                             std::min(gemm.nr, cols - i * gemm.nr), single.data.get(), 0);
            CHECK(
                std::memcmp(static_cast<char*>(together.data.get()) + i * static_cast<ptrdiff_t>(panel_bytes),
                            single.data.get(), panel_bytes) == 0);
          }
        }
  });
}

TEST_CASE("transpose") {
  for_every_set([](const KernelSet& set) {
    for (const int rows : {1, 7, 16, 33})
      for (const int cols : {1, 8, 17, 40}) {
        const std::vector<float> src = floats(rows * (cols + 1), 4);
        std::vector<float> dst(static_cast<std::size_t>(cols * (rows + 2)), -1.0f);
        set.epilogue.transpose(src.data(), cols + 1, rows, cols, dst.data(), rows + 2);
        for (int j = 0; j < cols; ++j)
          for (int i = 0; i < rows + 2; ++i)
            CHECK(dst[static_cast<std::size_t>(j * (rows + 2) + i)] ==
                  (i < rows ? src[static_cast<std::size_t>(i * (cols + 1) + j)] : -1.0f));
      }
  });
}

TEST_CASE("sum_scaled and round_scaled touch n elements and no more") {
  for_every_set([](const KernelSet& set) {
    for (const int n : {0, 1, 7, 8, 15, 16, 17, 31, 32, 50, 64, 131}) {
      const std::vector<float> x = floats(n + 1, 5), z = floats(n + 1, 7);
      for (const int count : {0, 1, 3}) {
        std::vector<float> y = floats(n + 1, 6), y_scalar = y;
        const float *terms[]{x.data(), y.data(), z.data()},
            *terms_scalar[]{x.data(), y_scalar.data(), z.data()};
        const float scales[]{0.3f, -1.5f, 2.0f};
        set.epilogue.sum_scaled(n, count, terms, scales, y.data());
        scalar_set().epilogue.sum_scaled(n, count, terms_scalar, scales, y_scalar.data());
        check_close(y, y_scalar, 1e-6);
      }
      std::vector<bf16_t> r(static_cast<std::size_t>(n) + 1, 77), r_scalar = r;
      set.epilogue.round_scaled(n, 0.3f, x.data(), r.data());
      scalar_set().epilogue.round_scaled(n, 0.3f, x.data(), r_scalar.data());
      CHECK(r == r_scalar);
      CHECK(r.back() == 77);
    }
  });
}

TEST_CASE("rounding to bf16 is to nearest even, and keeps NaN, infinity and denormals") {
  const std::vector<float> special{0.0f, -0.0f, kInf, -kInf, kNan, -kNan, 1e-40f, -1e-41f, 3.4e38f, 1.0039f,
                                   1.0f, 1.0117f, 1.001953f, 1.005859375f, -2.5f, 65504.0f, 1.1e-38f,
                                   9.2e-41f, 7.0f, 3.0f, -1e30f, 0.333333333f,
                                   // NaNs that plain rounding would turn into -0 and infinity
                                   std::bit_cast<float>(0x7fffffffu), std::bit_cast<float>(0x7f800001u)};
  for_every_set([&](const KernelSet& set) {
    const int n = static_cast<int>(special.size());
    std::vector<bf16_t> decoded(special.size()), scaled(special.size());
    set.decode.from_f32(n, special.data(), decoded.data());
    set.epilogue.round_scaled(n, 1.0f, special.data(), scaled.data());
    for (std::size_t i = 0; i < special.size(); ++i) {
      CAPTURE(special[i]);
      for (const bf16_t rounded : {decoded[i], scaled[i]})
        if (std::isnan(special[i]))
          CHECK(std::isnan(to_float(rounded)));
        else
          CHECK(rounded == to_bf16(special[i]));
    }
  });
}

TEST_CASE("every half-precision number decodes as in the scalar set") {
  std::vector<std::uint16_t> halves;
  for (int bits = 0; bits < 65536; ++bits) halves.push_back(static_cast<std::uint16_t>(bits));
  std::vector<bf16_t> truth(halves.size());
  scalar_set().decode.from_f16(65536, halves.data(), truth.data());
  CHECK(to_float(truth[0x3c00]) == 1.0f);
  CHECK(to_float(truth[0xc000]) == -2.0f);
  CHECK(to_float(truth[0x0001]) == 0x1p-24f);
  CHECK(to_float(truth[0x7c00]) == kInf);
  for_every_set([&](const KernelSet& set) {
    std::vector<bf16_t> ours(halves.size());
    set.decode.from_f16(65535, halves.data(), ours.data());
    ours.back() = truth.back();
    for (std::size_t i = 0; i < truth.size(); ++i)
      if (ours[i] != truth[i] && !(std::isnan(to_float(ours[i])) && std::isnan(to_float(truth[i]))))
        FAIL_CHECK(i);
  });
}

namespace {

void check_dot(float dot, float truth) {
  if (std::isnan(truth))
    CHECK(std::isnan(dot));
  else if (std::isinf(truth))
    CHECK(dot == truth);
  else
    CHECK(dot == doctest::Approx(truth).epsilon(1e-5));
}

// n elements of each row, and the 77 behind them.
void check_rows(int n, const std::vector<bf16_t*>& ours, const std::vector<std::vector<bf16_t>>& truth) {
  for (std::size_t i = 0; i < ours.size(); ++i) {
    CHECK(ours[i][n] == 77);
    for (std::size_t j = 0; j < static_cast<std::size_t>(n); ++j) {
      CAPTURE(i);
      CAPTURE(j);
      if (std::abs(to_float(truth[i][j])) < 1e-30f && std::abs(to_float(ours[i][j])) < 1e-30f) continue;
      check_same_bf16(ours[i][j], truth[i][j], 1);
    }
  }
}

void check_like_scalar(int activation) {
  std::vector<float> g = floats(203, 7), u = floats(203, 8), dh = floats(203, 9);
  for (std::size_t i = 0; i < g.size(); ++i) g[i] *= 10.0f, u[i] *= 5.0f;
  const std::vector<float> special{0.0f,  -0.0f,  60.0f, -60.0f, 87.5f,  -87.5f, 90.0f, -104.0f, 1000.0f,
                                   -1e4f, -1e30f, 1e30f, 3e38f,  -3e38f, kNan,   kInf,  -kInf};
  std::copy(special.begin(), special.end(), g.begin() + 20);
  std::copy(special.begin(), special.end(), u.begin() + 120);
  // Times a large slope they overflow, by the order of the factors.
  for (float& x : u)
    if (std::isfinite(x)) x = std::clamp(x, -1e35f, 1e35f);
  const std::vector<float> limits{6.96875f, 7.0f,  7.03125f, -6.96875f, -7.0f,  -7.03125f,
                                  9.9375f,  10.0f, 10.0625f, -9.9375f,  -10.0f, -10.0625f};
  std::copy(limits.begin(), limits.end(), g.begin() + 60);
  std::copy(limits.begin(), limits.end(), u.begin() + 80);
  struct alignas(64) Row {  // on a cache line: whole lines may be stored in another way than parts of one
    bf16_t data[205];
  };
  for_every_set([&](const KernelSet& set) {
    for (const auto& [n, offset] :
         std::vector<std::pair<int, int>>{{1, 0}, {8, 0}, {13, 1}, {32, 0}, {203, 0}, {203, 1}}) {
      const auto size = static_cast<std::size_t>(n) + 1;
      std::vector<Row> rows(6);
      std::vector<bf16_t*> ours;
      for (Row& row : rows) {
        std::fill_n(row.data, 205, bf16_t{77});
        ours.push_back(row.data + offset);
      }
      std::vector<std::vector<bf16_t>> truth(6, std::vector<bf16_t>(size, 77));
      const ActivationKernels &kernels = set.epilogue.activations->gated[activation],
                              &scalar = scalar_set().epilogue.activations->gated[activation];
      kernels.forward(n, g.data(), u.data(), ours[0], ours[1], ours[2]);
      scalar.forward(n, g.data(), u.data(), truth[0].data(), truth[1].data(), truth[2].data());
      const float dot =
          kernels.backward(n, dh.data(), 0.7f, truth[0].data(), truth[1].data(), ours[3], ours[4], ours[5]);
      const float dot_truth = scalar.backward(n, dh.data(), 0.7f, truth[0].data(), truth[1].data(),
                                              truth[3].data(), truth[4].data(), truth[5].data());
      check_dot(dot, dot_truth);
      check_rows(n, ours, truth);

      std::fill_n(rows[3].data, 205, bf16_t{77});
      std::fill(truth[3].begin(), truth[3].end(), bf16_t{77});
      const ActivationKernels &ungated = set.epilogue.activations->ungated[activation],
                              &scalar_ungated = scalar_set().epilogue.activations->ungated[activation];
      ungated.forward(n, nullptr, g.data(), nullptr, ours[0], ours[1]);
      scalar_ungated.forward(n, nullptr, g.data(), nullptr, truth[0].data(), truth[1].data());
      check_dot(ungated.backward(n, dh.data(), 0.7f, nullptr, truth[0].data(), nullptr, ours[2], ours[3]),
                scalar_ungated.backward(n, dh.data(), 0.7f, nullptr, truth[0].data(), nullptr,
                                        truth[2].data(), truth[3].data()));
      check_rows(n, ours, truth);
    }
  });
}

}  // namespace

TEST_CASE("activations forward and backward agree with the scalar set, also far out and on NaN") {
  for (int a = 0; a < kActivationCount; ++a) {
    CAPTURE(kActivationNames[a]);
    check_like_scalar(a);
  }
}

namespace {

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// The definitions, and the limit beyond which G and U count as the limit.
struct Definition {
  double (*value)(double g);
  double limit = INFINITY;
  double (*factor)(double u) = [](double u) { return u; };

  double h(double g, double u) const { return value(g) * factor(u); }
};

double silu(double g) { return g * sigmoid(g); }

Definition definition(Activation activation) {
  switch (activation) {
    case Activation::silu: return {silu};
    case Activation::gpt_oss:
      return {[](double g) { return g * sigmoid(1.702 * g); }, 7, [](double u) { return u + 1; }};
    case Activation::clamped_silu: return {silu, 10};
    case Activation::gelu_tanh:
      return {[](double g) {
        const double z = std::sqrt(2 / std::numbers::pi) * (g + 0.044715 * g * g * g);
        return g * sigmoid(2 * z);
      }};
    case Activation::gelu: return {[](double g) { return g * std::erfc(-g / std::numbers::sqrt2) / 2; }};
    case Activation::softcapped_silu:
      return {[](double g) { return 4 * std::tanh(g / 4) * sigmoid(g); }, INFINITY,
              [](double u) { return 25 * std::tanh(u / 25); }};
    case Activation::relu2: return {[](double g) { return g > 0 ? g * g : 0; }};
  }
  return {};
}

// h at (g, u), dh / dg and dh / du by differences. Nothing moves beyond a limit.
std::array<double, 3> defined(const Definition& of, double g, double u) {
  const double gate = std::min(g, of.limit), up = std::clamp(u, -of.limit, of.limit), step = 1e-6;
  const double by_gate = (of.h(gate, up) - of.h(gate - step, up)) / step;
  const double by_up = (of.h(gate, up) - of.h(gate, up - step)) / step;
  return {of.h(gate, up), g > of.limit ? 0 : by_gate, std::abs(u) > of.limit ? 0 : by_up};
}

// Without a gate: h at u, and dh / du.
std::array<double, 2> ungated(const Definition& of, double u) {
  const double up = std::min(u, of.limit), step = 1e-6;
  return {of.value(up), u > of.limit ? 0 : (of.value(up) - of.value(up - step)) / step};
}

}  // namespace

TEST_CASE("activations are those of their definitions, and their slopes the differences of neighbours") {
  for_every_set([](const KernelSet& set) {
    for (int a = 0; a < kActivationCount; ++a) {
      CAPTURE(kActivationNames[a]);
      const Definition of = definition(static_cast<Activation>(a));
      const ActivationKernels& kernels = set.epilogue.activations->gated[a];
      for (const float g : {-20.0f, -9.0f, -5.0f, -3.0f, -1.0f, -0.75f, -0.25f, 0.0f, 0.5f, 1.0f, 2.0f, 4.0f,
                            6.5f, 9.5f, 30.0f})
        for (const float u : {1.5f, -0.125f, 6.0f, 40.0f, -40.0f}) {
          CAPTURE(g);
          CAPTURE(u);
          const float dh = 1.0f;
          bf16_t gate, up, h[2], dg, du;
          kernels.forward(1, &g, &u, &gate, &up, h);
          const float dot = kernels.backward(1, &dh, 1.0f, &gate, &up, &dg, &du, h + 1);
          const auto [value, by_gate, by_up] = defined(of, g, u);
          for (const auto& [found, wanted] : {std::pair{to_float(h[0]), value},
                                              {to_float(h[1]), value},
                                              {to_float(du), by_up},
                                              {to_float(dg), by_gate}})
            CHECK(found == doctest::Approx(wanted).epsilon(0.005).scale(1e-5));
          CHECK(dot == doctest::Approx(value).epsilon(1e-4).scale(1e-5));
        }
    }
  });
}

TEST_CASE("without a gate activations are of U alone") {
  for_every_set([](const KernelSet& set) {
    for (int a = 0; a < kActivationCount; ++a) {
      CAPTURE(kActivationNames[a]);
      const Definition of = definition(static_cast<Activation>(a));
      const ActivationKernels& kernels = set.epilogue.activations->ungated[a];
      for (const float u : {-20.0f, -5.0f, -1.0f, -0.25f, 0.0f, 0.5f, 2.0f, 6.5f, 7.0f, 7.0625f, 9.5f, 10.0f,
                            10.0625f, 30.0f}) {
        CAPTURE(u);
        const float dh = 3.0f;
        bf16_t up, du, h[2];
        kernels.forward(1, nullptr, &u, nullptr, &up, h);
        const float dot = kernels.backward(1, &dh, 0.5f, nullptr, &up, nullptr, &du, h + 1);
        const auto [value, by_up] = ungated(of, u);
        for (const bf16_t found : h)
          CHECK(to_float(found) == doctest::Approx(value).epsilon(0.005).scale(1e-5));
        CHECK(to_float(du) == doctest::Approx(1.5 * by_up).epsilon(0.005).scale(1e-4));
        CHECK(dot == doctest::Approx(3 * value).epsilon(1e-4).scale(1e-5));
      }
    }
  });
}

TEST_CASE("limited activations: no gradient beyond a limit, however little, one on it") {
  for (const Activation activation : {Activation::gpt_oss, Activation::clamped_silu}) {
    const Definition of = definition(activation);
    const auto limit = static_cast<float>(of.limit);
    const float over = limit + limit / 128;  // the next bf16 number or so
    struct {
      float g, u;
      bool gate_moves, up_moves;
    } cases[] = {{1.0f, 1.0f, true, true},
                 {limit, limit, true, true},
                 {limit, -limit, true, true},
                 {over, 2.0f, false, true},
                 {-5 * limit, 2.0f, true, true},
                 {2.0f, over, true, false},
                 {2.0f, -over, true, false},
                 {2 * limit, 2 * limit, false, false},
                 {limit * 1.0002f, limit * -1.0002f, false, false},
                 {limit * 0.9998f, limit * 0.9998f, true, true}};
    for_every_set([&](const KernelSet& set) {
      const ActivationKernels& kernels = set.epilogue.activations->gated[static_cast<int>(activation)];
      for (const auto& [g, u, gate_moves, up_moves] : cases) {
        CAPTURE(g);
        CAPTURE(u);
        const float dh = 1e30f;
        bf16_t gate, up, h[3], dg, du;
        kernels.forward(1, &g, &u, &gate, &up, h);
        kernels.backward(1, &dh, 1.0f, &gate, &up, &dg, &du, h + 1);
        h[2] = to_bf16(static_cast<float>(defined(of, g, u)[0]));
        check_same_bf16(h[0], h[2], 1);
        check_same_bf16(h[1], h[2], 1);
        CHECK((to_float(dg) != 0.0f) == gate_moves);
        CHECK((to_float(du) != 0.0f) == up_moves);
      }
    });
  }
}

// <dh, h> is made of an h that is not rounded yet, so that it shows h in fp32.
TEST_CASE("smooth activations have a small relative error, far below 0 too") {
  for_every_set([](const KernelSet& set) {
    for (const auto& [activation, u, bound] : {std::tuple{Activation::silu, 1.0f, 1e-6},
                                               {Activation::gelu, 1.0f, 1e-6},
                                               {Activation::softcapped_silu, 0.01f, 2e-6},
                                               {Activation::softcapped_silu, -30.0f, 2e-6}}) {
      CAPTURE(kActivationNames[static_cast<int>(activation)]);
      const Definition of = definition(activation);
      double worst = 0.0;
      for (int i = -12 * 256; i <= 12 * 256; ++i) {
        const float dh = 1.0f;
        const bf16_t gate = to_bf16(static_cast<float>(i) / 256.0f), up = to_bf16(u);
        bf16_t dg, du, h;
        const double wanted = of.h(to_float(gate), to_float(up));
        const float dot = set.epilogue.activations->gated[static_cast<int>(activation)].backward(
            1, &dh, 1.0f, &gate, &up, &dg, &du, &h);
        if (wanted != 0.0) worst = std::max(worst, std::abs(dot / wanted - 1));
      }
      CHECK(worst < bound);
    }
  });
}

TEST_CASE("the registry: unknown and absent sets are refused, empty slots are filled from below") {
  CHECK_THROWS_WITH_AS(kernel_set("mmx", cpu_features()), doctest::Contains("wanted one of scalar"),
                       ValueError);
  CHECK_THROWS_WITH_AS(kernel_set("avx2", 0), doctest::Contains("this CPU lacks avx2"), ValueError);
  CHECK(best_isa(0) == "scalar");
  for_every_set([](const KernelSet& set) {
    CHECK(static_cast<bool>(set.gemm.micro_kernel));
    CHECK(static_cast<bool>(set.gemv.nn));
    CHECK(static_cast<bool>(set.epilogue.transpose));
    for (int a = 0; a < kActivationCount; ++a)
      CHECK(static_cast<bool>(set.epilogue.activations->gated[a].backward));
    CHECK(static_cast<bool>(set.decode.from_f16));
  });
}
