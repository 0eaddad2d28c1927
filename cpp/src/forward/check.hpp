#pragma once

/// Every check of a forward, once, before anything is written.

#include <cstdint>

#include "moesaic/forward.hpp"

namespace moesaic::forward {

/// Sizes of one call, known to be consistent.
struct CallSizes {
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  std::int64_t num_pairs = 0;
};

/// Throws ShapeError, DTypeError, DeviceError, ConfigError or UnsupportedError naming `operation`.
/// No allocation unless it throws.
CallSizes check_forward(const char* operation, DeviceType device, const LayerRef& layer,
                        const ForwardIo& io);

/// Asks the backend about every role; with `strict` its slower ways are errors too.
void check_supported(const char* operation, const Context& context, const LayerRef& layer);

/// Throws unless `view` lies on `device` and has an element type the forward reads and writes.
void check_float_tensor(const char* operation, const char* name, DeviceType device,
                        const ConstTensorView& view);
/// Throws unless `view` is dense [dims...] of `dtype` on `device`, with data unless it is empty.
void check_dense(const char* operation, const char* name, DeviceType device,
                 const ConstTensorView& view, DType dtype,
                 std::initializer_list<std::int64_t> dims);
/// Throws unless `out` is [rows, cols] f32, f16 or bf16 with contiguous rows that do not overlap.
void check_out(const char* operation, DeviceType device, const ConstTensorView& out,
               std::int64_t rows, std::int64_t cols);

}  // namespace moesaic::forward
