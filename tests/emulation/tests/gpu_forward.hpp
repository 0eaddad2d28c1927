// Whole forwards on the emulated GPU: its backend, arrays in its memory, the ways of a call.
#pragma once

#include "device_array.hpp"
#include "emulated_gpu.hpp"
#include "layer_case.hpp"
#include "layers.hpp"
#include "moesaic/forward.hpp"
#include "ways.hpp"

namespace moesaic::testing {

inline constexpr double kSingleBound = 1e-4;  ///< f32 in and out, hidden rows in two bf16 planes
inline constexpr double kSixteenBound = 5e-3;
inline constexpr Device kGpu{DeviceType::Cuda, 0};

inline const Backend& gpu_backend() {
  static const auto backend = EmulatedGpu::get().make_backend();
  static const auto registration = register_backend(backend);
  return *backend;
}

/// A tensor in device memory.
struct DeviceTensor {
  DType dtype;
  std::int64_t rows, cols;
  DeviceArray<std::byte> bytes;
  explicit DeviceTensor(const Tensor& host)
      : dtype(host.dtype), rows(host.rows), cols(host.cols), bytes(gpu_backend(), host.bytes) {}
  DeviceTensor(DType type, std::int64_t r, std::int64_t c) : DeviceTensor(Tensor(type, r, c)) {}
  TensorView view() const { return {bytes.data(), dtype, {rows, cols}, kGpu}; }
  Floats values() const {
    Tensor host(dtype, rows, cols);
    host.bytes = bytes.host();
    return host.values();
  }
};

struct DeviceRouting {
  DeviceArray<std::int32_t> ids;
  DeviceArray<float> weights;
  std::int64_t tokens;
  std::int32_t top_k;
  explicit DeviceRouting(const Routing& host)
      : ids(gpu_backend(), {host.topk_ids().begin(), host.topk_ids().end()}),
        weights(gpu_backend(), {host.topk_weights().begin(), host.topk_weights().end()}),
        tokens(host.num_tokens()),
        top_k(host.top_k()) {}
  RoutingView view() const { return {ids.data(), weights.data(), tokens, top_k}; }
};

/// The forward on a way, with a workspace of exactly the size that it asks for.
inline void run(Context& context, const LayerRef& layer, const ForwardIo& io, std::int32_t top_k,
                const Way& way = kWays[0]) {
  Workspace workspace(workspace_bytes(context, layer, top_k, io.x.dim(0)), context.backend());
  forward(context, layer, io, workspace, way);
}

/// A case with its tensors in device memory; what it wrote into poisoned memory there.
inline DeviceTensor run_case(Context& context, const LayerCase& c, const Way& way = kWays[0],
                             const RoutingView& routing_out = {}) {
  DeviceTensor out(c.out, c.tokens(), c.layer.hidden_size());
  ForwardIo io = c.io(out.view());
  io.routing_out = routing_out;
  run(context, c.layer, io, c.top_k(), way);
  return out;
}

/// The case by the reference on the host, where its tensors are.
inline Floats reference_of(const LayerCase& c) {
  Tensor out(c.out, c.tokens(), c.layer.hidden_size());
  moe_forward_cpu(c.layer, c.io(out.view()));
  return out.values();
}

inline Tuning exact() {
  Tuning tuning;
  tuning.precision = Precision::Exact;
  return tuning;
}

inline Context gpu_context(const Tuning& tuning = exact()) {
  return Context(gpu_backend(), tuning, ThreadPool::shared(1));
}

}  // namespace moesaic::testing
