// How the matrices of a layer are cut into slices of the intermediate dimension: between rows of gate and up,
// between columns of down. Pure.
#pragma once

#include <array>

#include "base/projection.h"
#include "base/weight.h"

namespace kt {

// Cuts on multiples of this leave a slice's codes whole bytes, its rows whole cache lines, and every block
// that shares a scale in one slice; unless the block is as long as the dimension: its scale then goes to
// every slice.
index_t cut_align(const std::array<WeightType, 3>& types, index_t intermediate);

// Codes, scales and zero points of a slice of a matrix, which is cut where it may be, and its global scale.
// `into` has its shape.
void copy_part(const Weight& from, Projection p, Range slice, const MutableWeight& into);

}  // namespace kt
