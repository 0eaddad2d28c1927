#pragma once

#include <pybind11/numpy.h>

#include <memory>

#include "bindings.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic::python {

using StackClass = py::class_<ExpertStack, std::shared_ptr<ExpertStack>>;

/// Adds the products with single tokens (gemv_*) and over a plan (gemm_*).
void define_products(StackClass& type);

/// One matrix as f32 [rows, cols]. Throws ShapeError unless there is such an expert.
py::array decoded_expert(const WeightRef& weight, std::int32_t expert, const char* operation);

}  // namespace moesaic::python
