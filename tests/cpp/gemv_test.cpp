// The GEMVs of every kernel set that this CPU runs, against the definition in double.
#include <doctest/doctest.h>
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "base/view.h"
#include "kernel_sets.h"

using namespace kt;

namespace {

constexpr bf16_t kNan = 0x7fc0;

template <class Body>
void for_every_set(const Body& body) {
  for_every_available_set([&](const KernelSet& set) { body(set.gemv); });
}

enum class Direction { nt, nn };
constexpr Direction kDirections[] = {Direction::nt, Direction::nn};

Gemv* kernel(const GemvKernels& gemv, Direction direction) {
  return direction == Direction::nn ? gemv.nn : gemv.nt;
}

// A matrix whose last row ends where a page ends, before one that may not be touched; what its stride leaves
// between the rows is `padding`.
template <class T>
class Matrix {
 public:
  Matrix(int rows, int cols, ptrdiff_t stride, T padding) : row_stride_(stride) {
    const std::size_t elements = static_cast<std::size_t>((rows - 1) * stride + cols);
    bytes_ = (elements * sizeof(T) + kPage - 1) / kPage * kPage;
    map_ = static_cast<char*>(
        mmap(nullptr, bytes_ + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    REQUIRE(map_ != MAP_FAILED);
    REQUIRE(mprotect(map_ + bytes_, kPage, PROT_NONE) == 0);
    data_ = reinterpret_cast<T*>(map_ + bytes_) - elements;
    std::fill_n(data_, elements, padding);
  }
  ~Matrix() { munmap(map_, bytes_ + kPage); }
  Matrix(const Matrix&) = delete;
  Matrix& operator=(const Matrix&) = delete;

  T* data() const { return data_; }
  ptrdiff_t stride() const { return row_stride_; }
  T& at(int i, int j) const { return data_[i * row_stride_ + j]; }

 private:
  static constexpr std::size_t kPage = 4096;
  std::size_t bytes_;
  char* map_;
  T* data_;
  ptrdiff_t row_stride_;
};

// The operands of one product. X has spare rows, which an index leaves out; all padding is NaN.
struct Operands {
  Operands(Direction the_direction, int the_rows, int the_n, int the_k, int padding, bool indexed)
      : direction(the_direction),
        rows(the_rows),
        n(the_n),
        k(the_k),
        x(indexed ? 3 * rows : rows, k, k + padding, kNan),
        w(across() ? k : n, across() ? n : k, (across() ? n : k) + padding, kNan) {
    std::mt19937 random(static_cast<unsigned>(rows + 100 * n + 10000 * k));
    std::normal_distribution<float> normal;
    for (int i = 0; i < rows; ++i) {
      if (indexed) index.push_back(3 * ((i + 1) % rows));
      for (int p = 0; p < k; ++p) x.at(indexed ? index.back() : i, p) = to_bf16(normal(random));
    }
    for (int j = 0; j < n; ++j)
      for (int p = 0; p < k; ++p) weight(j, p) = to_bf16(normal(random));
  }

  bool across() const { return direction == Direction::nn; }
  bf16_t& weight(int j, int p) const { return across() ? w.at(p, j) : w.at(j, p); }
  RowSource source() const { return {x.data(), x.stride(), index.empty() ? nullptr : index.data()}; }

  // Columns begin.. of the product into c, as many as c has.
  void multiply(const GemvKernels& gemv, int begin, int cols, const Matrix<float>& c, bool accumulate) const {
    kernel(gemv, direction)(rows, cols, k, source(), &weight(begin, 0), w.stride(), c.data(), c.stride(),
                            accumulate);
  }

  double exact(int i, int j) const {
    double sum = 0;
    for (int p = 0; p < k; ++p)
      sum += double{to_float(x.at(index.empty() ? i : index[static_cast<std::size_t>(i)], p))} *
             to_float(weight(j, p));
    return sum;
  }

  Direction direction;
  int rows, n, k;
  Matrix<bf16_t> x, w;
  std::vector<std::int32_t> index;
};

constexpr float kCanary = -77.0f;

void check_product(const GemvKernels& gemv, const Operands& operands, int padding, bool accumulate) {
  const Matrix<float> c(operands.rows, operands.n, operands.n + padding, kCanary);
  for (int i = 0; i < operands.rows; ++i)
    for (int j = 0; j < operands.n; ++j)
      c.at(i, j) = accumulate ? 0.5f : std::numeric_limits<float>::quiet_NaN();
  operands.multiply(gemv, 0, operands.n, c, accumulate);

  const double tolerance = 2e-5 * std::sqrt(operands.k) + 1e-6 * operands.k / 64;
  for (int i = 0; i < operands.rows; ++i)
    for (int j = 0; j < operands.n; ++j) {
      const double wanted = operands.exact(i, j) + (accumulate ? 0.5 : 0.0);
      if (!(std::abs(c.at(i, j) - wanted) <= tolerance)) {
        CAPTURE(i);
        CAPTURE(j);
        CHECK(c.at(i, j) == doctest::Approx(wanted));
        return;
      }
    }
  for (int i = 0; i + 1 < operands.rows; ++i)
    for (int j = 0; j < padding; ++j) CHECK(c.at(i, operands.n + j) == kCanary);
}

void check_shape(Direction direction, int rows, int n, int k) {
  CAPTURE(direction == Direction::nn);
  CAPTURE(rows);
  CAPTURE(n);
  CAPTURE(k);
  for (const int padding : {0, 5})
    for (const bool indexed : {false, true}) {
      const Operands operands(direction, rows, n, k, padding, indexed);
      for_every_set([&](const GemvKernels& gemv) {
        check_product(gemv, operands, padding, false);
        check_product(gemv, operands, padding, true);
      });
    }
}

}  // namespace

TEST_CASE("every number of rows, tails of n and k, odd k: nothing is read or written beyond the matrices") {
  for (const Direction direction : kDirections)
    for (int rows = 1; rows <= kGemvRows; ++rows)
      for (const int n : {1, 3, 16, 31, 33, 70})
        for (const int k : {1, 2, 9, 16, 33, 64, 79}) check_shape(direction, rows, n, k);
}

TEST_CASE("matrices larger than the blocks that the kernels take at a time") {
  for (const Direction direction : kDirections) {
    check_shape(direction, 8, 50, 4500);
    check_shape(direction, 7, 2500, 35);
    check_shape(direction, 5, 34, 2049);
    check_shape(direction, 3, 129, 130);
  }
  for_every_set([](const GemvKernels& gemv) {
    check_product(gemv, Operands(Direction::nt, 1, 2, 40000, 0, false), 0, true);
    check_product(gemv, Operands(Direction::nn, 1, 40000, 3, 0, false), 0, true);
  });
}

TEST_CASE("the bits of a result do not depend on the columns computed with it") {
  for (const Direction direction : kDirections)
    for (const int rows : {1, 4, 8}) {
      const Operands operands(direction, rows, 200, 1100, 0, false);
      for_every_set([&](const GemvKernels& gemv) {
        const Matrix<float> whole(rows, 200, 200, 0.0f);
        operands.multiply(gemv, 0, 200, whole, false);
        for (const auto& [begin, end] : {std::pair{0, 1}, {1, 18}, {37, 102}, {150, 200}}) {
          const Matrix<float> part(rows, end - begin, end - begin, 0.0f);
          operands.multiply(gemv, begin, end - begin, part, false);
          for (int i = 0; i < rows; ++i)
            CHECK(std::memcmp(&part.at(i, 0), &whole.at(i, begin),
                              static_cast<std::size_t>(end - begin) * sizeof(float)) == 0);
        }
      });
    }
}

TEST_CASE("a NaN or an infinity reaches the results it belongs to, and no other") {
  for (const Direction direction : kDirections)
    for (const bf16_t special : {kNan, bf16_t{0x7f80}}) {
      const Operands operands(direction, 3, 37, 35, 2, false);
      operands.x.at(1, 34) = special;
      operands.weight(36, 34) = special;
      for_every_set([&](const GemvKernels& gemv) {
        const Matrix<float> c(3, 37, 37, 0.0f);
        operands.multiply(gemv, 0, 37, c, false);
        for (int i = 0; i < 3; ++i)
          for (int j = 0; j < 37; ++j) CHECK(std::isfinite(c.at(i, j)) == (i != 1 && j != 36));
        CHECK(std::isnan(c.at(1, 0)) == (special == kNan));  // an infinity stays one
        CHECK(std::isnan(c.at(0, 36)) == (special == kNan));
      });
    }
}
