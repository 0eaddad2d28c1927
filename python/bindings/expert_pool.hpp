#pragma once

/// What the files about pools share.

#include <pybind11/numpy.h>

#include <algorithm>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "moesaic/expert_pool.hpp"

namespace moesaic::python {

/// A new numpy array with a copy of the values, of the shape given (or flat).
template <class T>
py::array_t<T> copied(std::span<const T> values, std::vector<py::ssize_t> shape = {}) {
  if (shape.empty()) shape.push_back(static_cast<py::ssize_t>(values.size()));
  py::array_t<T> out(shape);
  std::ranges::copy(values, out.mutable_data());
  return out;
}

/// A mask of bytes as a new numpy array of bool.
inline py::array_t<bool> copied_mask(const std::vector<std::uint8_t>& mask) {
  py::array_t<bool> out(static_cast<py::ssize_t>(mask.size()));
  std::ranges::transform(mask, out.mutable_data(), [](std::uint8_t one) { return one != 0; });
  return out;
}

/// "every_decode_steps(4)", as it is made in Python.
std::string text_of(const RefreshPolicy& policy);
/// A list of (expert, slot, evicted).
py::list load_tuples(const std::vector<SlotLoad>& loads);

}  // namespace moesaic::python
