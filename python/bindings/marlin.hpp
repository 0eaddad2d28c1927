#pragma once

/// What the files of the INT4 stacks share.

#include <array>
#include <memory>

#include "arrays.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic::python {

using MarlinClass = py::class_<MarlinExpertStack, std::shared_ptr<MarlinExpertStack>>;

/// One expert as codes, in the layout of other kernels, and as f32.
void define_marlin_layouts(MarlinClass& type);
/// The products over dispatches and over aligned blocks.
void define_marlin_products(MarlinClass& type);

/// Tensors of the caller, and what keeps them alive.
struct TensorRefs {
  ArrayRef qweight, scales, qzeros, g_idx;
  GptqTensors tensors;

  TensorRefs(const char* operation, const py::object& qweight_array, const py::object& scales_array,
             const py::object& qzeros_array, const py::object& g_idx_array)
      : qweight(import_array(qweight_array, operation, "qweight")),
        scales(import_array(scales_array, operation, "scales")) {
    if (!qzeros_array.is_none()) qzeros = import_array(qzeros_array, operation, "qzeros");
    if (!g_idx_array.is_none()) g_idx = import_array(g_idx_array, operation, "g_idx");
    tensors.qweight = qweight.read();
    tensors.scales = scales.read();
    tensors.qzeros = qzeros.read();
    tensors.g_idx = g_idx.read();
  }
};

}  // namespace moesaic::python
