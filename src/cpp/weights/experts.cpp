#include "weights/experts.h"

#include <cstring>

#include "base/error.h"

namespace kt {

namespace {

// One row to bf16; fp16 and fp32 are rounded to nearest even.
void decode_row(const DecodeKernels& decode, const MatView& source, index_t row, std::uint16_t* target) {
  const int n = static_cast<int>(source.cols);
  const void* from = source.at(row, 0);
  switch (source.dtype) {
    case DType::bf16: std::memcpy(target, from, static_cast<std::size_t>(n) * sizeof *target); break;
    case DType::f16: decode.from_f16(n, static_cast<const std::uint16_t*>(from), target); break;
    case DType::f32: decode.from_f32(n, static_cast<const float*>(from), target); break;
    default:
      throw ValueError(
          message("expert weights are {}, wanted bfloat16, float16 or float32", name_of(source.dtype)));
  }
}

}  // namespace

Experts::Experts(std::shared_ptr<Runtime> runtime, int num_experts, index_t hidden, index_t intermediate,
                 Activation activation, const Source& source)
    : runtime_(std::move(runtime)),
      memory_(static_cast<std::size_t>(projections.size() * num_experts * hidden * intermediate) *
              sizeof(bf16_t)) {
  const index_t each = num_experts * hidden * intermediate;
  auto* data = static_cast<bf16_t*>(memory_.data());
  weights_ = {
      num_experts,
      hidden,
      intermediate,
      activation,
      {Stack{data, DType::bf16, intermediate, hidden}, Stack{data + each, DType::bf16, intermediate, hidden},
       Stack{data + 2 * each, DType::bf16, hidden, intermediate}}};

  Runtime::Lease lease(*runtime_);
  lease.parallel_for(num_experts * std::ssize(projections), [&](index_t task, Arena&) {
    const int expert = static_cast<int>(task / std::ssize(projections));
    const Projection p = projections[static_cast<std::size_t>(task % std::ssize(projections))];
    const MatView from = source(expert, p), to = weights_.of(p)[expert];
    for (index_t row = 0; row < to.rows; ++row)
      decode_row(lease.kernels().decode, from, row,
                 static_cast<std::uint16_t*>(const_cast<void*>(to.at(row, 0))));
  });
}

std::shared_ptr<Experts> Experts::from_index(std::shared_ptr<Runtime> runtime, const ExpertIndex& index,
                                             int layer, Activation activation) {
  const auto source = index.open(layer);
  const LayerInfo& info = source->info();
  KT_CHECK(info.types[0].format == Format::bf16, "layer {} is {} {}, wanted BF16, F16 or F32", layer,
           info.stored_type, info.layout);
  const DecodeKernels decode = Runtime::Lease(*runtime).kernels().decode;
  return std::make_shared<Experts>(std::move(runtime), info.num_experts, info.hidden_size,
                                   info.intermediate_size, activation, [&](int expert, Projection p) {
                                     thread_local Arena memory;
                                     memory.reset();
                                     MutableWeight into = info.matrix(p);
                                     into.codes = memory.take<std::byte>(into.codes_bytes());
                                     source->read(expert, p, into, memory, decode);
                                     return view(into.codes, DType::bf16, into.rows, into.cols);
                                   });
}

}  // namespace kt
