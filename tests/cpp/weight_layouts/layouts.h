// Layouts in which one stored copy of an expert's weight W can serve X W' and dY W, each with both products.
#pragma once

#include <deque>
#include <vector>

#include "base/memory.h"
#include "gemm/gemm.h"

namespace kt::layouts {

struct Direct;

// W is [out, in], out and in multiples of 32.
struct Shape {
  index_t out, in;
  index_t bytes() const { return out * in * static_cast<index_t>(sizeof(bf16_t)); }
};

struct Bench {
  const KernelSet& kernels;
  const Direct* direct;  // null for a kernel set whose panels are not pairs of bf16 in 32 columns
  std::size_t l2;        // bytes
  Shape shape;
  bool prefetch = false;  // the next strip's weights while this one is multiplied
};

// result [rows of tokens, n] in bf16 = tokens times one expert's W, transposed or not.
using Product = void(const Bench& bench, const void* w, MatView tokens, bf16_t* result, Arena& scratch);

struct Layout {
  const char* name;
  const char* weights;  // those of all experts
  Product *forward, *backward;
  bool prefetch;
};

// The same random weights in every layout; the first one is natural order.
class Stored {
 public:
  Stored(const Bench& bench, index_t experts);
  const std::vector<Layout>& layouts() const { return layouts_; }

 private:
  std::deque<Buffer> memory_;
  std::vector<Layout> layouts_;
};

void fill(bf16_t* data, index_t n);  // random, of both signs around 1

}  // namespace kt::layouts
