#pragma once

/// Every check of a forward, once, before anything is written.

#include <cstdint>
#include <initializer_list>
#include <utility>

#include "moesaic/forward.hpp"

namespace moesaic::forward {

/// Sizes of one call, known to be consistent.
struct CallSizes {
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  std::int64_t num_pairs = 0;
  bool ready_routing = false;  ///< ids and weights came with the call
};

/// Throws ShapeError, DTypeError, DeviceError, ConfigError or UnsupportedError naming `operation`.
/// No allocation unless it throws.
CallSizes check_forward(const char* operation, DeviceType device, const LayerRef& layer,
                        const ForwardIo& io);

/// Asks the backend about every role and part; with `strict` its slower ways are errors too.
void check_supported(const char* operation, const Context& context, const LayerRef& layer);

/// The tensors of a call lie on the backend's own device (the other checks ask for its kind alone).
void check_same_device(const char* operation, Device device, const ForwardIo& io);
void check_same_device(const char* operation, Device device,
                       std::initializer_list<std::pair<const char*, ConstTensorView>> tensors);

/// The layer alone (check_layer.cpp): its stacks, norms and projections fit together.
void check_layer(const char* operation, const LayerRef& layer);
/// There is a router, consistent in itself and with the stack.
void check_router_config(const char* operation, const LayerRef& layer);
/// There is a router weight of the right size.
void check_router_weight(const char* operation, const LayerRef& layer);

/// The token ids of the call, in host memory, are rows of the layer's table.
void check_token_ids(const char* operation, const LayerRef& layer, const ForwardIo& io);
/// With `strict` the ids and token ids in device memory are what they would have to be on the host.
/// Throws CaptureError where they cannot be read now.
void check_device_ids(const char* operation, Context& context, const LayerRef& layer,
                      const ForwardIo& io);

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
