#include "moe/ceilings.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <latch>

#include "base/view.h"
#include "cpu/topology.h"
#include "gemm/gemm.h"

namespace kt {

namespace {

constexpr int kRepetitions = 7;
constexpr int kCalls = 64;                            // of the micro-kernel between two looks at the clock
constexpr int kRounds = 4096;                         // of the multiply-add alone, likewise
constexpr std::size_t kChunk = std::size_t{1} << 20;  // bytes read between two looks at the clock
constexpr std::size_t kUsualL1 = std::size_t{32} << 10;
constexpr std::size_t kWord = sizeof(std::uint64_t);

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// work(thread) does a little and returns how much. Its rate over all `threads` running at once.
template <class Work>
std::vector<double> rates(Runtime::Lease& lease, int threads, double seconds, const Work& work) {
  std::vector<double> totals;
  for (int repetition = -1; repetition < kRepetitions; ++repetition) {  // the first one only warms up
    std::vector<double> rate(to_size(threads));
    std::latch together(threads);  // no thread takes a second task while it waits here for the others
    lease.parallel_for(threads, [&](index_t thread, Arena&) {
      together.arrive_and_wait();
      const double begin = now();
      double done = 0, elapsed = 0;
      do {
        done += work(to_int(thread));
        elapsed = now() - begin;
      } while (elapsed < seconds / kRepetitions);
      rate[to_size(thread)] = done / elapsed;
    });
    double total = 0;
    for (const double r : rate) total += r;
    if (repetition >= 0) totals.push_back(total);
  }
  return totals;
}

// A matrix of bf16 numbers of both signs around 1, none of them special.
Rows numbers(index_t rows, index_t cols, Arena& memory) {
  auto* data = memory.take<bf16_t>(rows * cols);
  std::uint32_t state = 1;
  for (index_t i = 0; i < rows * cols; ++i) {
    state = state * 1664525u + 1013904223u;
    data[i] = static_cast<bf16_t>(0x3f00u | ((state >> 16) & 0x80ffu));
  }
  return {view(data, DType::bf16, rows, cols)};
}

// Largest k whose panels of `width` rows or columns fit in `bytes`.
index_t fitting_k(const GemmKernels& gemm, std::size_t bytes, int width) {
  const index_t k = static_cast<index_t>(bytes) / (width * gemm.element_bytes);
  return std::max<index_t>(1, k / gemm.k_align) * gemm.k_align;
}

// The micro-kernel over panels of A and one of B, a result tile a thread.
class Products {
 public:
  Products(Runtime::Lease& lease, int threads) : gemm_(lease.kernels().gemm), tiles_(to_size(threads)) {
    for (float*& tile : tiles_) tile = lease.arena(0).take<float>(gemm_.mr * gemm_.nr);
  }

  double operator()(int thread) const {
    if (gemm_.begin != nullptr) gemm_.begin();
    for (int call = 0; call < calls; ++call) {
      const BatchElement element{a + (call % panels) * panel_bytes, b, a_stride, k, {}};
      gemm_.micro_kernel(gemm_.mr, gemm_.nr, &element, 1, tiles_[to_size(thread)], gemm_.nr, 0);
    }
    if (gemm_.end != nullptr) gemm_.end();
    return 2.0 * gemm_.mr * gemm_.nr * k * calls;
  }

  const char *a = nullptr, *b = nullptr;
  index_t panels = 1, panel_bytes = 0, a_stride = 0;
  int k = 0, calls = kCalls;

 private:
  const GemmKernels& gemm_;
  std::vector<float*> tiles_;
};

// The multiply-add alone, each thread on registers of its own.
class Registers {
 public:
  Registers(Runtime::Lease& lease, int threads) : gemm_(lease.kernels().gemm), words_(to_size(threads)) {
    for (void*& words : words_)
      words = const_cast<void*>(numbers(1, kPeakBytes / 2, lease.arena(0)).matrix.data);
  }

  double operator()(int thread) const {
    if (gemm_.begin != nullptr) gemm_.begin();
    const double done = gemm_.peak(kRounds, words_[to_size(thread)]);
    if (gemm_.end != nullptr) gemm_.end();
    return done;
  }

 private:
  const GemmKernels& gemm_;
  std::vector<void*> words_;
};

// One panel serves as A and as B: k, which hides the cost of storing the tile, can then be twice as large.
void put_in_l1(Products& products, Runtime::Lease& lease, std::size_t l1) {
  const KernelSet& kernels = lease.kernels();
  const int mr = kernels.gemm.mr, nr = kernels.gemm.nr;
  const index_t k = fitting_k(kernels.gemm, l1 / 4 * 3, std::max(mr, nr));
  products.k = to_int(k);
  products.b = nr >= mr ? pack_b_cols(kernels, numbers(nr, k, lease.arena(0)), lease.arena(0)).data
                        : pack_a(kernels, numbers(mr, k, lease.arena(0)), lease.arena(0)).data;
  products.a = products.b;
}

// As multiply() goes: a B panel stays while A passes by. A third of the L1 leaves room for the A panel in
// use.
void put_in_l2(Products& products, Runtime::Lease& lease, std::size_t l1) {
  const KernelSet& kernels = lease.kernels();
  const GemmKernels& gemm = kernels.gemm;
  const index_t k = fitting_k(gemm, l1 / 3, std::max(gemm.mr, gemm.nr));
  const index_t half = static_cast<index_t>(lease.workers().l2_bytes / 2);
  products.k = to_int(k);
  products.panels = std::max<index_t>(1, half / (gemm.mr * k * gemm.element_bytes));
  const PackedA a = pack_a(kernels, numbers(products.panels * gemm.mr, k, lease.arena(0)), lease.arena(0));
  products.a = a.data;
  products.panel_bytes = a.panel_bytes;
  products.a_stride = a.row_bytes;
  products.b = pack_b_cols(kernels, numbers(gemm.nr, k, lease.arena(0)), lease.arena(0)).data;
  products.calls = to_int(products.panels);
}

std::uint64_t read_chunk(const std::uint64_t* words) {
  std::uint64_t sums[8] = {};  // eight chains: what limits is the memory, not the latency of xor
  for (std::size_t i = 0; i < kChunk / kWord; i += 8)
    for (std::size_t j = 0; j < 8; ++j) sums[j] ^= words[i + j];
  for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
  return sums[0];
}

std::vector<double> read_rates(Runtime::Lease& lease, int threads, double seconds, std::size_t bytes) {
  const std::size_t chunks = std::max<std::size_t>(1, bytes / kChunk / to_size(threads));
  const Buffer buffer(chunks * kChunk * to_size(threads));
  auto* const words = static_cast<std::uint64_t*>(buffer.data());
  const auto slice = [&](index_t thread) { return words + to_size(thread) * chunks * (kChunk / kWord); };
  // Written first, or every page would be the one page of zeros.
  lease.parallel_for(threads, [&](index_t thread, Arena&) {
    std::fill_n(slice(thread), chunks * (kChunk / kWord), static_cast<std::uint64_t>(thread) + 1);
  });
  struct alignas(128) Reader {  // a cache line or two of its own
    std::size_t chunk = 0;
    std::uint64_t sum = 0;
  };
  std::vector<Reader> readers(to_size(threads));
  volatile std::uint64_t keep = 0;  // or the reading would be left out
  std::vector<double> result = rates(lease, threads, seconds, [&](int thread) {
    Reader& reader = readers[to_size(thread)];
    reader.sum ^= read_chunk(slice(thread) + reader.chunk * (kChunk / kWord));
    reader.chunk = (reader.chunk + 1) % chunks;
    return static_cast<double>(kChunk);
  });
  for (const Reader& reader : readers) keep = keep ^ reader.sum;
  return result;
}

}  // namespace

Ceilings measure_ceilings(Runtime& runtime, double seconds, std::size_t read_bytes) {
  Runtime::Lease lease(runtime);
  const int threads = runtime.threads();
  const Topology topology = read_topology();
  const std::size_t l1 = topology.l1d == 0 ? kUsualL1 : topology.l1d;
  const Registers registers(lease, threads);
  Products in_l1(lease, threads), in_l2(lease, threads);
  put_in_l1(in_l1, lease, l1);
  put_in_l2(in_l2, lease, l1);
  Ceilings ceilings;
  ceilings.l1_one = rates(lease, 1, seconds, in_l1);
  ceilings.l1_all = rates(lease, threads, seconds, in_l1);
  const bool known = lease.kernels().gemm.peak != nullptr;
  ceilings.registers_one = known ? rates(lease, 1, seconds, registers) : ceilings.l1_one;
  ceilings.registers_all = known ? rates(lease, threads, seconds, registers) : ceilings.l1_all;
  ceilings.l2_one = rates(lease, 1, seconds, in_l2);
  ceilings.l2_all = rates(lease, threads, seconds, in_l2);
  ceilings.read_one = read_rates(lease, 1, seconds, read_bytes);
  ceilings.read_all = read_rates(lease, threads, seconds, read_bytes);
  return ceilings;
}

}  // namespace kt
