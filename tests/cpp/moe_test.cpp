#include <doctest/doctest.h>

#include <numeric>
#include <vector>

#include "base/error.h"
#include "moe/linear.h"
#include "moe/plan.h"
#include "moe/runtime.h"

using namespace kt;

namespace {

template <class T>
MatView ids_view(const std::vector<T>& ids, index_t k) {
  return view(ids.data(), sizeof(T) == 8 ? DType::i64 : DType::i32, static_cast<index_t>(ids.size()) / k, k);
}

}  // namespace

TEST_CASE("routing groups by expert and keeps the order of tokens") {
  const std::vector<std::int64_t> ids{2, 0,  //
                                      0, 2,  //
                                      4, 2,  // 4 of 4 experts: no route
                                      2, 2};
  const Routing r = route(ids_view(ids, 2), 4);
  CHECK(r.routes() == 7);
  CHECK(count_routes(ids_view(ids, 2), 4) == 7);
  CHECK(r.experts == std::vector<std::int32_t>{0, 2});
  CHECK(r.expert_offsets == std::vector<std::int32_t>{0, 2, 2, 7, 7});
  CHECK(r.sorted_token_ids == std::vector<std::int32_t>{0, 1, 0, 1, 2, 3, 3});
  CHECK(r.sorted_slots == std::vector<std::int32_t>{1, 2, 0, 3, 5, 6, 7});
  CHECK(r.first(2) == 2);
  CHECK(r.count(2) == 5);
}

TEST_CASE("routing: int32 ids, no tokens, no routes, one expert for all") {
  CHECK(route(ids_view(std::vector<std::int32_t>{1, 1, 1}, 1), 2).expert_offsets ==
        std::vector<std::int32_t>{0, 0, 3});
  CHECK(route(ids_view(std::vector<std::int64_t>{}, 2), 3).routes() == 0);
  CHECK(route(ids_view(std::vector<std::int64_t>{3, 3}, 2), 3).routes() == 0);
  std::vector<std::int64_t> all(1000, 5);
  const Routing r = route(ids_view(all, 10), 6);
  std::vector<std::int32_t> slots(1000);
  std::iota(slots.begin(), slots.end(), 0);
  CHECK(r.sorted_slots == slots);
}

TEST_CASE("routing names the first id out of range") {
  const std::vector<std::int64_t> high{0, 1, 2, 4}, negative{0, -1, 9, 0};
  CHECK_THROWS_WITH_AS(route(ids_view(high, 2), 3),
                       doctest::Contains("topk_ids[1, 1] is 4, wanted an expert in [0, 3)"), ValueError);
  CHECK_THROWS_WITH_AS(count_routes(ids_view(negative, 2), 3), doctest::Contains("topk_ids[0, 1] is -1"),
                       ValueError);
}

TEST_CASE("routes of some experts are sorted in the order given") {
  const std::vector<std::int64_t> ids{2, 0,  //
                                      1, 2,  //
                                      4, 2};
  std::vector<std::int32_t> permutation(4), inverse(6);
  sort_routes(ids_view(ids, 2), 4, {2, 3, 0}, permutation, inverse);
  CHECK(permutation == std::vector<std::int32_t>{0, 3, 5, 1});
  CHECK(inverse == std::vector<std::int32_t>{0, 3, -1, 1, -1, 2});
  CHECK_THROWS_WITH_AS(sort_routes(ids_view(ids, 2), 4, {2, 2}, permutation, inverse),
                       doctest::Contains("experts has 2, wanted numbers in [0, 4), each once"), ValueError);
  CHECK_THROWS_WITH_AS(sort_routes(ids_view(ids, 2), 4, {4}, permutation, inverse),
                       doctest::Contains("experts has 4"), ValueError);
  CHECK_THROWS_WITH_AS(sort_routes(ids_view(ids, 2), 4, {2}, permutation, inverse),
                       doctest::Contains("there is room for 4 routes and 6 entries, wanted 3 and 6"),
                       ValueError);
}

TEST_CASE("dropout depends on its place alone, and on the seed, the projection and the route") {
  const Dropout dropout{0.3f, 42};
  const auto mask = [](const Dropout& d, Projection p, index_t slot, index_t col, index_t n) {
    std::vector<float> row(static_cast<std::size_t>(n), 1.0f);
    drop(d, p, slot, col, n, row.data());
    return row;
  };
  const std::vector<float> whole = mask(dropout, Projection::up, 5, 0, 1000);
  for (const index_t cut : {1, 64, 999}) {
    std::vector<float> pieces = mask(dropout, Projection::up, 5, 0, cut);
    const std::vector<float> rest = mask(dropout, Projection::up, 5, cut, 1000 - cut);
    pieces.insert(pieces.end(), rest.begin(), rest.end());
    CHECK(pieces == whole);
  }
  CHECK(mask(dropout, Projection::gate, 5, 0, 1000) != whole);
  CHECK(mask(dropout, Projection::up, 6, 0, 1000) != whole);
  CHECK(mask({0.3f, 43}, Projection::up, 5, 0, 1000) != whole);

  std::vector<bf16_t> bf16(1000, to_bf16(1.0f));
  drop(dropout, Projection::up, 5, 0, 1000, bf16.data());
  for (std::size_t i = 0; i < whole.size(); ++i) CHECK(to_float(bf16[i]) == whole[i]);
}

TEST_CASE("dropout drops its share, in every row and column") {
  constexpr int kRows = 400, kCols = 400;
  std::vector<double> by_col(kCols);
  double total = 0, neighbours = 0;
  for (int row = 0; row < kRows; ++row) {
    std::vector<float> kept(kCols, 1.0f);
    drop({0.1f, 7}, Projection::gate, row, 0, kCols, kept.data());
    double sum = 0;
    for (std::size_t i = 0; i < kCols; ++i) {
      sum += kept[i];
      by_col[i] += kept[i];
      if (i > 0) neighbours += (kept[i] - 0.9) * (kept[i - 1] - 0.9);
    }
    CHECK(sum / kCols == doctest::Approx(0.9).epsilon(0.09));  // more than 5 standard deviations
    total += sum;
  }
  for (const double kept : by_col) CHECK(kept / kRows == doctest::Approx(0.9).epsilon(0.09));
  CHECK(total / (kRows * kCols) == doctest::Approx(0.9).epsilon(0.005));
  CHECK(std::abs(neighbours / (kRows * kCols)) < 5 * 0.09 / kRows);
}

TEST_CASE("runtime: numbers and names out of range are refused by name") {
  CHECK_THROWS_WITH_AS(Runtime(0, {}, {}), "threads is 0, wanted a number from 1 to 4096", ValueError);
  CHECK_THROWS_WITH_AS(Runtime({}, 65, {}), "shards is 65, wanted a number from 1 to 64", ValueError);
  CHECK(Runtime(2, 16, "scalar").shards() == 16);
  CHECK_THROWS_WITH_AS(Runtime(1, {}, "sse9"), doctest::Contains("isa is \"sse9\""), ValueError);
  CHECK(Runtime(3, 1, "scalar").threads() == 3);
}

TEST_CASE("runtime: scratch is what the last lease had in use, its own and the workers'") {
  Runtime runtime(2, 1, "scalar");
  CHECK(runtime.scratch_bytes() == 0);
  {
    Runtime::Lease lease(runtime);
    lease.arena(0).take<char>(6400);
    lease.parallel_for(5, [](index_t, Arena& scratch) { scratch.take<char>(640); });
  }
  CHECK(runtime.scratch_bytes() >= 6400 + 640);  // one worker may have done it all
  CHECK(runtime.scratch_bytes() <= 6400 + 2 * 640);
  {
    const Runtime::Lease lease(runtime);
  }
  CHECK(runtime.scratch_bytes() == 0);
}
