#pragma once

/// A backend written for reading: scalar, nothing fused, default phases, memory that it counts and
/// poisons. Every test that passes on it and on a real backend tests the contract, not the kernels.

#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "dot_f64.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"
#include "moesaic/error.hpp"

namespace moesaic::testing {

class FakeBackend : public Backend {
 public:
  mutable std::atomic<std::int64_t> live_bytes{0};
  QuantType refused = QuantType::Q8_K;  ///< a type that `supports` turns down

  BackendInfo info() const override {
    BackendInfo info;
    info.name = "fake";
    info.devices = {Device{}};
    info.detail = "scalar, for tests";
    return info;
  }
  std::string kernel_name(const WeightRef&, const Tuning&) const override { return "gemm_fake"; }
  Support supports(const WeightRef& weight) const override {
    if (weight.type == refused) return {false, "refused by the fake backend"};
    return {weight.layout == WeightLayout::Rows, ""};
  }
  void* allocate(std::size_t bytes) const override {
    void* memory = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
    if (memory == nullptr) throw OutOfMemoryError("fake: allocate failed");
    std::memset(memory, 0xFF, bytes);
    live_bytes += static_cast<std::int64_t>(bytes);
    return memory;
  }
  void deallocate(void* memory, std::size_t bytes) const noexcept override {
    live_bytes -= static_cast<std::int64_t>(bytes);
    std::memset(memory, 0xFF, bytes);
    std::free(memory);
  }
  void copy(void* to, const void* from, std::size_t bytes) const override {
    std::memmove(to, from, bytes);
  }
  void synchronize(Context&) const override {}
  void prepare(ExpertStack::Parts&, const LoadOptions&) const override {}
  std::size_t scratch_bytes(const ScratchQuery&) const override { return 0; }

  void router_logits(Context&, const InputRows& x, const float* weight, std::int32_t num_experts,
                     float* logits) const override {
    for (std::int64_t t = 0; t < x.num_rows; ++t) {
      for (std::int32_t e = 0; e < num_experts; ++e) {
        double sum = 0.0;
        for (std::int64_t c = 0; c < x.cols; ++c) {
          sum +=
              static_cast<double>(element(x, t, c)) * static_cast<double>(weight[e * x.cols + c]);
        }
        logits[t * num_experts + e] = static_cast<float>(sum);
      }
    }
  }
  RouteStats route(Context&, const float* logits, std::int64_t row_stride,
                   const RouterConfig& config, RoutingView out, float* scratch) const override {
    return route_rows(logits, row_stride, config, out, scratch);
  }
  void bucket_plan(Context&, const RoutingView& routing, std::int32_t num_experts,
                   BucketPlanView out) const override {
    build_bucket_plan(routing.topk_ids, routing.num_pairs(), routing.top_k, num_experts, out);
  }
  void align(Context&, const BucketPlanView& plan, std::int64_t num_pairs, std::int32_t num_experts,
             std::int32_t block_size, RowSpace row_space, AlignedRoutingView out) const override {
    align_block_size(plan, num_pairs, num_experts, block_size, row_space, out);
  }
  void gather(Context&, const InputRows& x, const std::int32_t* index, std::int64_t rows,
              float* out) const override {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t c = 0; c < x.cols; ++c) out[r * x.cols + c] = element(x, index[r], c);
    }
  }
  void expert_gemm(Context&, const GemmCall& call) const override {
    const WeightRef& w = call.weights->ref;
    // Kept by the thread: the forward must not allocate. First the expert's weights, then a row of
    // x.
    static thread_local std::vector<float> memory;
    const auto needed = static_cast<std::size_t>((w.rows + 1) * w.cols);
    if (memory.size() < needed) memory.resize(needed);
    float* const x = memory.data() + w.rows * w.cols;
    for (std::int32_t s = 0; s < call.rows.num_segments; ++s) {
      const std::int32_t expert = call.rows.expert_of(s);
      const std::int32_t count = expert < 0 ? 0 : call.rows.count(s);
      if (count == 0) continue;
      for (std::int64_t r = 0; r < w.rows; ++r) {
        dequantize_expert_row(w, expert, r, memory.data() + r * w.cols);
      }
      for (std::int32_t i = call.rows.begin(s); i < call.rows.begin(s) + count; ++i) {
        for (std::int64_t c = 0; c < w.cols; ++c) {
          x[c] = element(call.in, call.rows.source_of(i), c);
        }
        for (std::int64_t r = 0; r < w.rows; ++r) {
          double sum = dot_f64(memory.data() + r * w.cols, x, w.cols);
          if (call.weights->scale) {
            sum *= static_cast<double>((*call.weights->scale)[static_cast<std::size_t>(expert)]);
          }
          if (call.weights->bias) {
            sum += static_cast<double>(
                (*call.weights->bias)[static_cast<std::size_t>(expert * w.rows + r)]);
          }
          call.out[call.rows.destination_of(i) * w.rows + r] = static_cast<float>(sum);
        }
      }
    }
  }
  void activate(Context&, const Activation& activation, const float* gate, const float* up,
                std::int64_t row_stride, std::int64_t rows, std::int64_t intermediate,
                float* hidden) const override {
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t i = 0; i < intermediate; ++i) {
        const float g = activation.gated() ? gate[r * row_stride + i] : 0.0F;
        hidden[r * intermediate + i] = moesaic::activate(activation, g, up[r * row_stride + i]);
      }
    }
  }
  void combine(Context&, const CombineCall& call) const override {
    const TensorView& out = call.out;
    const std::int64_t hidden = out.dim(1);
    for (std::int64_t t = 0; t < call.routing.num_tokens; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) {
        const std::int64_t at = t * out.stride(0) + h * out.stride(1);
        float sum = call.accumulate ? load(out.data, out.dtype, at) : 0.0F;
        for (std::int32_t s = 0; s < call.routing.top_k; ++s) {
          const std::int64_t pair = t * call.routing.top_k + s;
          if (call.routing.topk_ids[pair] < 0) continue;
          const std::int64_t row = call.pair_row != nullptr ? call.pair_row[pair] : pair;
          if (row < 0) continue;
          sum += call.routing.topk_weights[pair] * call.rows[row * hidden + h];
        }
        store(out.data, out.dtype, at, sum);
      }
    }
  }

 private:
  static float load(const void* data, DType dtype, std::int64_t i) {
    if (dtype == DType::F16) return f16_to_f32(static_cast<const std::uint16_t*>(data)[i]);
    if (dtype == DType::BF16) return bf16_to_f32(static_cast<const std::uint16_t*>(data)[i]);
    return static_cast<const float*>(data)[i];
  }
  static void store(void* data, DType dtype, std::int64_t i, float value) {
    if (dtype == DType::F16) {
      static_cast<std::uint16_t*>(data)[i] = f32_to_f16(value);
    } else if (dtype == DType::BF16) {
      static_cast<std::uint16_t*>(data)[i] = f32_to_bf16(value);
    } else {
      static_cast<float*>(data)[i] = value;
    }
  }
  static float element(const InputRows& x, std::int64_t row, std::int64_t col) {
    return load(x.data, x.dtype, x.element_offset(row) + col);
  }
};

}  // namespace moesaic::testing
