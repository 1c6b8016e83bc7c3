// Writes the matrices of a layer, by all threads of a runtime, and tells how far it is.
#pragma once

#include <array>
#include <cstddef>
#include <functional>
#include <span>
#include <vector>

#include "base/arena.h"
#include "kernels/kernel_set.h"
#include "moe/runtime.h"
#include "weights/layer_plan.h"
#include "weights/quantize.h"

namespace kt {

struct Matrix {
  int expert;
  Projection projection;
};

// Expert by expert.
std::vector<Matrix> matrices_of(const LayerPlan& plan);

// A slice of the intermediate dimension of every matrix of a layer, and where it lies as planned.
struct Piece {
  Range slice;
  LayerPlan plan;
  std::byte* memory = nullptr;
};

// Writes one matrix; called by several threads at once, each with scratch of its own. Returns the
// error of quantising it, if it was.
using Fill = std::function<QuantError(const Matrix& matrix, const MutableWeight& into,
                                      const KernelSet& kernels, Arena& scratch)>;

// Called on the caller's thread now and then, with the bytes done since the last call. What it throws ends
// the work. The runtime is taken meanwhile: it must not be used from there.
using Report = std::function<void(std::size_t bytes)>;

// Fills the pieces that make up a layer in the given order; in the end `nbytes` have been reported. A matrix
// is written where it lies, or if there are several pieces, to scratch, and each takes its part: the bits are
// the same however it is cut. Returns the errors of gate, up and down, added expert by expert.
std::array<QuantError, 3> fill_all(Runtime& runtime, const LayerPlan& plan, std::span<const Piece> pieces,
                                   const std::vector<Matrix>& order, std::size_t nbytes, const Fill& fill,
                                   const Report& report);

// A matrix without memory gets some.
MutableWeight in_scratch(MutableWeight w, Arena& scratch);

// A bf16, fp16 or fp32 matrix in the type of `into`; fp16 is rounded to bf16 before it is quantised.
QuantError convert(const KernelSet& kernels, const MatView& from, const MutableWeight& into, Arena& scratch);

}  // namespace kt
