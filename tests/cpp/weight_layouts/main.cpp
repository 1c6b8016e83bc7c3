// Times a frozen expert's two products, X W' and dY W, from one stored copy of W in several layouts, one
// expert after the other out of more memory than the caches hold; docs/weight-layout.md says why.
//
//     weight_layouts ISA [THREADS] [MEGABYTES of weights]   prints a table
//     weight_layouts smoke                                   checks the products on small shapes, every ISA
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "base/view.h"
#include "cpu/processor.h"
#include "cpu/topology.h"
#include "cpu/worker_pool.h"
#include "kernels.h"
#include "kernels/registry.h"
#include "layouts.h"

using namespace kt;
using namespace kt::layouts;

namespace {

constexpr double kSeconds = 4;  // for one layout, in turns with the others
constexpr int kTurns = 3;       // at least

const Direct* direct_of(std::string_view isa) {
  return isa == "amx" ? &direct_amx : isa == "avx512_bf16" ? &direct_avx512_bf16 : nullptr;
}

struct Case {
  Bench bench;
  index_t experts, rows;
  const bf16_t *x, *dy;  // [rows, in], [rows, out]
};

MatView tokens_of(const Case& c, bool forward) {
  return view(forward ? c.x : c.dy, DType::bf16, c.rows, forward ? c.bench.shape.in : c.bench.shape.out);
}

// Whether some hundred elements of a result are those of the definition, to what bf16 allows.
bool correct(const Case& c, const bf16_t* w, bool forward, const bf16_t* y) {
  const Shape& shape = c.bench.shape;
  const index_t n = forward ? shape.out : shape.in, k = forward ? shape.in : shape.out;
  const bf16_t* tokens = forward ? c.x : c.dy;
  const index_t step = std::max<index_t>(1, c.rows * n / 499) | 1;  // odd: every column has its turn
  for (index_t at = 0; at < c.rows * n; at += step) {
    const index_t i = at / n, j = at % n;
    double sum = 0;
    for (index_t p = 0; p < k; ++p)
      sum += double{to_float(tokens[i * k + p])} * double{to_float(w[forward ? j * k + p : p * n + j])};
    const double error = std::fabs(to_float(y[at]) - sum);
    if (!(error <= std::fabs(sum) / 128 + 1e-3 * std::sqrt(static_cast<double>(k)))) return false;
  }
  return true;
}

Bench with(Bench bench, const Layout& layout) {
  bench.prefetch = layout.prefetch;
  return bench;
}

struct Crew {
  WorkerPool pool;
  std::vector<Arena> scratch;
  explicit Crew(int threads) : pool(threads), scratch(static_cast<std::size_t>(threads)) {}
};

// Adds the seconds of one product of every expert, a thread taking one expert after the other.
void turn(const Case& c, const Layout& layout, bool forward, Crew& team, std::vector<double>& seconds) {
  std::vector<double> each(static_cast<std::size_t>(c.experts));
  const auto claim = team.pool.claim();
  team.pool.parallel_for(static_cast<int>(c.experts), [&](int expert, int worker) {
    Arena& scratch = team.scratch[static_cast<std::size_t>(worker)];
    const Arena::Frame frame(scratch);
    auto* result = scratch.take<bf16_t>(c.rows * std::max(c.bench.shape.out, c.bench.shape.in));
    const auto begin = std::chrono::steady_clock::now();
    (forward ? layout.forward : layout.backward)(with(c.bench, layout),
                                                 layout.weights + expert * c.bench.shape.bytes(),
                                                 tokens_of(c, forward), result, scratch);
    each[static_cast<std::size_t>(expert)] =
        std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  });
  seconds.insert(seconds.end(), each.begin(), each.end());
}

// The tenth percentile: on a machine that other programs share, much of the rest is theirs.
double low(std::vector<double>& values) {
  const auto place = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 10);
  std::ranges::nth_element(values, place);
  return *place;
}

bool check(const Case& c, const Stored& stored) {
  bool all = true;
  Arena scratch;
  for (const Layout& layout : stored.layouts())
    for (const bool forward : {true, false}) {
      const Arena::Frame frame(scratch);
      const index_t n = c.rows * (forward ? c.bench.shape.out : c.bench.shape.in);
      auto* result = scratch.take<bf16_t>(n);
      std::fill_n(result, n, bf16_t{0x7fc0});  // NaN
      const index_t last = (c.experts - 1) * c.bench.shape.bytes();
      (forward ? layout.forward : layout.backward)(with(c.bench, layout), layout.weights + last,
                                                   tokens_of(c, forward), result, scratch);
      const char* natural = stored.layouts().front().weights + last;
      if (correct(c, reinterpret_cast<const bf16_t*>(natural), forward, result)) continue;
      std::fprintf(stderr, "wrong: %s, %s, %ld rows of [%ld, %ld]\n", layout.name,
                   forward ? "forward" : "backward", long{c.rows}, long{c.bench.shape.out},
                   long{c.bench.shape.in});
      all = false;
    }
  return all;
}

void time(const Case& c, const Stored& stored, Crew& team) {
  const std::vector<Layout>& all = stored.layouts();
  std::vector<std::array<std::vector<double>, 2>> seconds(all.size());
  const auto begin = std::chrono::steady_clock::now();
  const std::chrono::duration<double> budget(kSeconds * static_cast<double>(all.size()));
  for (int i = 0; i < kTurns || std::chrono::steady_clock::now() - begin < budget; ++i)
    for (std::size_t layout = 0; layout < all.size(); ++layout)
      for (const bool forward : {true, false}) turn(c, all[layout], forward, team, seconds[layout][!forward]);

  const double flop = 2.0 * static_cast<double>(c.rows * c.bench.shape.out * c.bench.shape.in);
  double both_of_first = 0;
  for (std::size_t layout = 0; layout < all.size(); ++layout) {
    const double threads = static_cast<double>(team.scratch.size());
    const double f = low(seconds[layout][0]) / threads, b = low(seconds[layout][1]) / threads;
    if (layout == 0) both_of_first = f + b;
    std::printf("| %ld x %ld | %ld | %s | %.0f | %.0f | %.0f | %.0f | %.2f |\n", long{c.bench.shape.out},
                long{c.bench.shape.in}, long{c.rows}, all[layout].name, f * 1e6, flop / f * 1e-9, b * 1e6,
                flop / b * 1e-9, (f + b) / both_of_first);
  }
  std::fflush(stdout);
}

struct Run {
  std::vector<Shape> shapes;
  std::vector<index_t> rows;
  std::size_t bytes;  // of weights; at least four experts a thread
  std::size_t l2;
  int threads;
  bool timed;
};

bool run(const Run& run, std::string_view isa) {
  KernelSet kernels = kernel_set(isa, cpu_features());
  kernels.gemm.in_place = false;  // to read rows where they lie is a layout of its own here
  Crew team(run.threads);
  bool all = true;
  for (const Shape& shape : run.shapes) {
    const index_t most = *std::ranges::max_element(run.rows);
    const index_t experts =
        round_up(std::max(ceil_div(static_cast<index_t>(run.bytes), shape.bytes()), index_t{4 * run.threads}),
                 run.threads);
    const Bench bench{kernels, direct_of(isa), run.l2, shape};
    const Stored stored(bench, experts);
    std::vector<bf16_t> x(static_cast<std::size_t>(most * shape.in)),
        dy(static_cast<std::size_t>(most * shape.out));
    fill(x.data(), most * shape.in);
    fill(dy.data(), most * shape.out);
    for (const index_t rows : run.rows) {
      const Case c{bench, experts, rows, x.data(), dy.data()};
      all = check(c, stored) && all;
      if (run.timed) time(c, stored, team);
    }
  }
  return all;
}

int smoke() {
  constexpr std::size_t kSmallL2 = 16 << 10;  // several strips
  bool all = true;
  for (const KernelEntry& entry : kernel_registry())
    if (availability(entry, cpu_features()) == "available")
      all = run({{{64, 160}, {608, 96}}, {1, 8, 12, 40, 100}, 1, kSmallL2, 1, false}, entry.name) && all;
  return all ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) try {
  const std::string isa = argc > 1 ? argv[1] : "smoke";
  if (isa == "smoke") return smoke();
  const int threads = argc > 2 ? std::atoi(argv[2]) : 1, megabytes = argc > 3 ? std::atoi(argv[3]) : 400;
  std::printf("%s, %s, %d threads\n\n", read_topology().model.c_str(), isa.c_str(), threads);
  std::printf(
      "| W | rows | layout | forward, us | GFLOP/s | backward, us | GFLOP/s | both, over A |\n"
      "|---|---|---|---|---|---|---|---|\n");
  const std::size_t known = read_topology().l2, l2 = known == 0 ? std::size_t{1} << 20 : known;
  const Run whole{{{768, 2048}, {2048, 7168}},
                  {8, 32, 128, 512},
                  static_cast<std::size_t>(megabytes) << 20,
                  l2,
                  std::max(1, threads),
                  true};
  return run(whole, isa) ? 0 : 1;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 2;
}
