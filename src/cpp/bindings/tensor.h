// A torch tensor as the core sees it: checked, then a pointer with a shape. Does not link torch.
#pragma once

#include <pybind11/pybind11.h>

#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/view.h"
#include "weights/json.h"

namespace kt {

struct Tensor {
  void* data;
  DType dtype;
  std::vector<index_t> shape;

  index_t dim(std::size_t i) const { return shape[i]; }
  std::size_t bytes() const;
  MatView matrix() const { return view(data, dtype, shape[0], shape[1]); }
};

// Reads the tensor's address, dtype and shape. TypeError when it is no tensor; ValueError, naming it `name`,
// when it is not on the CPU, not contiguous, without data (a FakeTensor), or of a dtype or number of
// dimensions that was not asked for.
Tensor read_tensor(pybind11::handle object, const std::string& name, std::initializer_list<DType> dtypes,
                   std::size_t dims);

// ValueError unless the shape is the one wanted; `meaning` says what the dimensions are, as "[E, r, H]".
void check_shape(const Tensor& tensor, const std::string& name, std::initializer_list<index_t> wanted,
                 std::string_view meaning);

}  // namespace kt
