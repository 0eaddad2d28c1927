#pragma once

/// A backend written for reading: scalar, nothing fused, default phases, memory that it counts and
/// poisons. Every test that passes on it and on a real backend tests the contract, not the kernels.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include "dot_f64.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/config.hpp"
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

  void fill(Context&, const op::Fill& call) const override {
    std::memset(call.data, call.value, static_cast<std::size_t>(call.bytes));
  }

  void router_logits(Context&, const op::RouterLogits& call) const override {
    const InputRows& x = call.x;
    for (std::int64_t t = 0; t < x.num_rows; ++t) {
      for (std::int32_t e = 0; e < call.num_experts; ++e) {
        double sum = 0.0;
        for (std::int64_t c = 0; c < x.cols; ++c) {
          sum += static_cast<double>(element(x, t, c)) *
                 static_cast<double>(call.weight[e * x.cols + c]);
        }
        call.logits[t * call.num_experts + e] = static_cast<float>(sum);
      }
    }
  }
  RouteStats route(Context&, const op::Route& call) const override { return route_rows(call); }
  void shared_routing(Context&, const op::SharedRouting& call) const override {
    for (std::int64_t t = 0; t < call.out.num_tokens; ++t) {
      call.out.topk_ids[t] = 0;
      call.out.topk_weights[t] =
          call.logits != nullptr ? 1.0F / (1.0F + std::exp(-call.logits[t])) : 1.0F;
    }
  }
  void bucket_plan(Context&, const op::BucketPlan& call) const override { build_bucket_plan(call); }
  void align(Context&, const op::Align& call) const override { align_block_size(call); }
  void gather(Context&, const op::Gather& call) const override {
    const std::int64_t cols = call.x.cols;
    for (std::int64_t r = 0; r < call.rows; ++r) {
      for (std::int64_t c = 0; c < cols; ++c) {
        call.out[r * cols + c] = element(call.x, call.index[r], c);
      }
    }
  }
  void zero_skipped(Context&, const op::ZeroSkipped& call) const override {
    for (std::int64_t r = 0; r < call.rows; ++r) {
      if (call.ids[r] < 0) std::fill_n(call.out + r * call.cols, call.cols, 0.0F);
    }
  }
  void expert_gemm(Context&, const op::Gemm& call) const override {
    const WeightRef& w = call.weight.ref;
    auto* const out = static_cast<float*>(call.out);
    // Kept by the thread: the forward must not allocate. First the expert's weights, then a row of
    // x.
    static thread_local std::vector<float> memory;
    const auto needed = static_cast<std::size_t>((w.rows + 1) * w.cols);
    if (memory.size() < needed) memory.resize(needed);
    float* const x = memory.data() + w.rows * w.cols;
    for (std::int32_t s = 0; s < call.map.num_segments; ++s) {
      const std::int32_t expert = call.map.expert_of(s);
      const std::int32_t count = expert < 0 ? 0 : call.map.count(s);
      if (count == 0) continue;
      for (std::int64_t r = 0; r < w.rows; ++r) {
        dequantize_expert_row(w, expert, r, memory.data() + r * w.cols);
      }
      for (std::int32_t i = call.map.begin(s); i < call.map.begin(s) + count; ++i) {
        for (std::int64_t c = 0; c < w.cols; ++c) {
          x[c] = element(call.in, call.map.source_of(i), c);
        }
        for (std::int64_t r = 0; r < w.rows; ++r) {
          double sum = dot_f64(memory.data() + r * w.cols, x, w.cols);
          if (call.weight.scale != nullptr) {
            sum *= static_cast<double>(call.weight.scale[expert]);
          }
          if (call.weight.bias != nullptr) {
            sum += static_cast<double>(call.weight.bias[expert * w.rows + r]);
          }
          out[call.map.destination_of(i) * w.rows + r] = static_cast<float>(sum);
        }
      }
    }
  }
  void activate(Context&, const op::Activate& call) const override {
    for (std::int64_t r = 0; r < call.rows; ++r) {
      for (std::int64_t i = 0; i < call.intermediate; ++i) {
        const std::int64_t at = r * call.row_stride + i;
        const float g = call.activation.gated() ? call.gate[at] : 0.0F;
        call.hidden[r * call.intermediate + i] = moesaic::activate(call.activation, g, call.up[at]);
      }
    }
  }
  void combine(Context&, const op::Combine& call) const override {
    const OutputRows& out = call.out;
    const auto* const rows = static_cast<const float*>(call.rows);
    const std::int64_t hidden = out.cols;
    for (std::int64_t t = 0; t < call.routing.num_tokens; ++t) {
      for (std::int64_t h = 0; h < hidden; ++h) {
        const std::int64_t at = t * out.stride + h;
        float sum = call.accumulate ? load(out.data, out.dtype, at) : 0.0F;
        for (std::int32_t s = 0; s < call.routing.top_k; ++s) {
          const std::int64_t pair = t * call.routing.top_k + s;
          if (call.routing.topk_ids[pair] < 0) continue;
          const std::int64_t row = call.pair_row != nullptr ? call.pair_row[pair] : pair;
          if (row < 0) continue;
          const float* const weights = call.routing.topk_weights;  // without them all are 1
          sum += (weights != nullptr ? weights[pair] : 1.0F) * rows[row * hidden + h];
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
