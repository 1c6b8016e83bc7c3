#include "weights/fill.h"

#include <atomic>
#include <utility>

#include "weights/cut.h"
#include "weights/layer_source.h"

namespace kt {

namespace {

QuantError fill_one(const Matrix& m, const LayerPlan& plan, std::span<const Piece> pieces, const Fill& fill,
                    const KernelSet& kernels, Arena& scratch) {
  const auto place = [&](const Piece& piece) { return piece.plan.at(piece.memory, m.expert, m.projection); };
  if (pieces.size() == 1) return fill(m, place(pieces.front()), kernels, scratch);
  const MutableWeight all = in_scratch(plan.shape(m.projection), scratch);
  const QuantError error = fill(m, all, kernels, scratch);
  for (const Piece& piece : pieces) copy_part(frozen(all), m.projection, piece.slice, place(piece));
  return error;
}

}  // namespace

std::vector<Matrix> matrices_of(const LayerPlan& plan) {
  std::vector<Matrix> all;
  for (int e = 0; e < plan.num_experts; ++e)
    for (const Projection p : projections) all.push_back({e, p});
  return all;
}

std::array<QuantError, 3> fill_all(Runtime& runtime, const LayerPlan& plan, std::span<const Piece> pieces,
                                   const std::vector<Matrix>& order, std::size_t nbytes, const Fill& fill,
                                   const Report& report) {
  const std::size_t tasks = order.size();
  std::atomic<std::size_t> done{0};
  std::size_t reported = 0;  // the caller's alone
  const auto tell = [&] {
    const std::size_t now = nbytes / tasks * done + (done == tasks ? nbytes % tasks : 0);
    report(now - std::exchange(reported, now));
  };
  std::vector<QuantError> errors(tasks);
  {
    Runtime::Lease lease(runtime);
    const auto fill_task = [&](index_t task, Arena& scratch) {
      const Matrix& m = order[static_cast<std::size_t>(task)];
      const auto place = static_cast<std::size_t>(m.expert) * projections.size() + index_of(m.projection);
      errors[place] = fill_one(m, plan, pieces, fill, lease.kernels(), scratch);
      ++done;
    };
    std::function<void()> between;
    if (report) between = tell;
    lease.parallel_for(static_cast<index_t>(tasks), fill_task, between);
    if (report) tell();
  }
  std::array<QuantError, 3> sums{};
  for (std::size_t i = 0; i < tasks; ++i) {
    sums[i % sums.size()].error += errors[i].error;
    sums[i % sums.size()].norm += errors[i].norm;
  }
  return sums;
}

MutableWeight in_scratch(MutableWeight w, Arena& scratch) {
  const auto take = [&](index_t bytes) { return bytes == 0 ? nullptr : scratch.take<std::byte>(bytes); };
  w.codes = take(w.codes_bytes());
  w.scales = take(w.scales_bytes());
  w.zeros = take(w.zeros_bytes());
  w.global_scale = take(w.global_scale_bytes());
  return w;
}

QuantError convert(const KernelSet& kernels, const MatView& from, const MutableWeight& into, Arena& scratch) {
  const bool keep = into.type.format == Format::bf16;
  if (!keep && from.dtype != DType::f16) return quantize(kernels, from, into);
  auto* rows = keep ? reinterpret_cast<bf16_t*>(into.codes) : scratch.take<bf16_t>(from.rows * from.cols);
  round_rows(kernels.decode, from, rows);
  return keep ? QuantError{} : quantize(kernels, view(rows, DType::bf16, from.rows, from.cols), into);
}

}  // namespace kt
