#pragma once

/// Arrays whose values are read on the host: ids and small weights.

#include <vector>

#include "arrays.hpp"

namespace moesaic::python {

/// int32 or int64 ids as dense int32. In host memory they are a copy, because another thread may
/// change the caller's array after they are checked; on a GPU they are that array.
struct Ids {
  ArrayRef array;
  std::vector<std::int32_t> copy;
  ConstTensorView view;

  /// Makes one of the first `count` dimensions, which dense ids always allow.
  void merge_first(int count);
};
/// Imports ids. Errors: as import_array; DTypeError (not int32 or int64; on a GPU not int32),
/// ShapeError (beyond int32; on a GPU not dense).
Ids import_ids(py::handle object, const char* operation, const char* name,
               const DeviceStream& target = {});

/// An f32, f16 or bf16 array as a vector of f32. Errors as import_array, and DTypeError.
std::vector<float> import_floats(py::handle object, const char* operation, const char* name);

}  // namespace moesaic::python
