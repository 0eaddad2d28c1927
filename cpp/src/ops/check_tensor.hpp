#pragma once

/// Checks of one tensor, or of the weights, that an operation is given. Each throws an error that
/// names the operation and the tensor.

#include <cstdint>
#include <initializer_list>
#include <string>

#include "moesaic/context.hpp"

namespace moesaic::ops {

[[noreturn]] void wrong_shape(const char* operation, const char* name, const std::string& expected,
                              const ConstTensorView& got);

/// ShapeError unless `view` is [dims...], with data unless it is empty.
void check_shape(const char* operation, const char* name, const ConstTensorView& view,
                 std::initializer_list<std::int64_t> dims);

/// What input_rows takes: f32, f16 or bf16 on `device` with a contiguous last dimension, with data
/// unless it is empty. DTypeError, DeviceError, ShapeError. The rank is the caller's to check.
void check_input(const char* operation, const char* name, Device device,
                 const ConstTensorView& view);

/// Dense [dims...] of `dtype` on `device`, with data unless it is empty.
void check_dense(const char* operation, const char* name, Device device,
                 const ConstTensorView& view, DType dtype,
                 std::initializer_list<std::int64_t> dims);

/// What output_rows takes: [rows, cols] f32, f16 or bf16 on `device`, with contiguous rows that do
/// not overlap.
void check_out(const char* operation, Device device, const ConstTensorView& out, std::int64_t rows,
               std::int64_t cols);

/// ShapeError when `out` shares memory with the input `name`: operations do not run in place.
void check_apart(const char* operation, const char* name, const ConstTensorView& in,
                 const ConstTensorView& out);

/// The context's backend holds the weights and multiplies them; with `strict` its slower ways are
/// errors too. `what` they are, `lies_on` where; `hint` says how they get to a device.
void check_weights(const char* operation, const Context& context, const std::string& what,
                   const WeightRef& weights, Device lies_on, const char* hint);

}  // namespace moesaic::ops
