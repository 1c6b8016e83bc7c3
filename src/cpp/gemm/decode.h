// Weights for products: bf16 where they lie, every other format decoded into scratch, a block at a time.
#pragma once

#include "base/memory.h"
#include "base/weight.h"
#include "kernels/kernel_set.h"

namespace kt {

// Some rows and columns of a weight. Columns begin on an even number where two codes share a byte.
struct WeightBlock {
  const Weight* weight = nullptr;
  Range rows = {}, cols = {};

  WeightBlock rows_of(Range r) const { return {weight, {rows.begin + r.begin, rows.begin + r.end}, cols}; }
  WeightBlock cols_of(Range r) const { return {weight, rows, {cols.begin + r.begin, cols.begin + r.end}}; }
  bool is_bf16() const { return weight->type.format == Format::bf16; }
};

inline WeightBlock whole(const Weight& weight) { return {&weight, {0, weight.rows}, {0, weight.cols}}; }

// The codes of a block, as bytes: what is read when it is used.
MatView codes_of(const WeightBlock& block);

// The block as one run for a kernel: its rows' scales are the same, or a row's length apart; and its first
// column begins a group, or no column behind it does. Not bf16.
bool is_run(const WeightBlock& block);
CodedRows coded(const WeightBlock& run);

// The block in bf16: itself, or decoded into scratch.
MatView in_bf16(const KernelSet& kernels, const WeightBlock& block, Arena& scratch);

// The same to rows `stride` elements apart.
void decode(const KernelSet& kernels, const WeightBlock& block, bf16_t* to, index_t stride);

}  // namespace kt
