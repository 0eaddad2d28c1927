#include <cmath>
#include <cstring>
#include <vector>

#include "forward/check.hpp"
#include "moesaic/forward.hpp"

namespace moesaic {
namespace {

using Floats = std::vector<float>;

float element(const void* data, DType dtype, std::int64_t index) {
  switch (dtype) {
    case DType::F16:
      return f16_to_f32(static_cast<const std::uint16_t*>(data)[index]);
    case DType::BF16:
      return bf16_to_f32(static_cast<const std::uint16_t*>(data)[index]);
    default:
      return static_cast<const float*>(data)[index];
  }
}

void set_element(void* data, DType dtype, std::int64_t index, float value) {
  switch (dtype) {
    case DType::F16:
      static_cast<std::uint16_t*>(data)[index] = f32_to_f16(value);
      break;
    case DType::BF16:
      static_cast<std::uint16_t*>(data)[index] = f32_to_bf16(value);
      break;
    default:
      static_cast<float*>(data)[index] = value;
  }
}

/// The sum in f64, in four strands that the processor can run side by side.
double dot(const float* a, const float* b, std::int64_t n) {
  double sum[4] = {};
  std::int64_t i = 0;
  for (; i + 4 <= n; i += 4) {
    for (std::int64_t j = 0; j < 4; ++j) {
      sum[j] += static_cast<double>(a[i + j]) * static_cast<double>(b[i + j]);
    }
  }
  for (; i < n; ++i) sum[0] += static_cast<double>(a[i]) * static_cast<double>(b[i]);
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

/// One role of one expert in f32: y = (W x) * scale + bias.
struct DenseRole {
  std::int64_t rows, cols;
  Floats values;
  float scale = 1.0F;
  const float* bias = nullptr;

  DenseRole(const RoleWeights& role, std::int32_t expert)
      : rows(role.ref.rows),
        cols(role.ref.cols),
        values(static_cast<std::size_t>(role.ref.rows * role.ref.cols)) {
    for (std::int64_t row = 0; row < rows; ++row) {
      dequantize_expert_row(role.ref, expert, row, values.data() + row * cols);
    }
    if (role.scale) scale = (*role.scale)[static_cast<std::size_t>(expert)];
    if (role.bias) bias = role.bias->data() + expert * rows;
  }

  float apply(std::int64_t row, const float* x) const {
    double y = dot(values.data() + row * cols, x, cols) * static_cast<double>(scale);
    if (bias != nullptr) y += static_cast<double>(bias[row]);
    return static_cast<float>(y);
  }
};

/// One expert's FFN: down(activation(gate x, up x)).
class DenseExpert {
 public:
  DenseExpert(const ExpertStack& stack, const Activation& activation, std::int32_t expert)
      : activation_(activation),
        up_(stack.up(), expert),
        down_(stack.down(), expert),
        hidden_(static_cast<std::size_t>(up_.rows)) {
    if (stack.gated()) gate_.emplace(stack.gate(), expert);
  }

  void apply(const float* x, float* y) {
    for (std::int64_t i = 0; i < up_.rows; ++i) {
      const float g = gate_ ? gate_->apply(i, x) : 0.0F;
      hidden_[static_cast<std::size_t>(i)] = activate(activation_, g, up_.apply(i, x));
    }
    for (std::int64_t h = 0; h < down_.rows; ++h) y[h] = down_.apply(h, hidden_.data());
  }

 private:
  Activation activation_;
  std::optional<DenseRole> gate_;
  DenseRole up_, down_;
  Floats hidden_;
};

Floats to_f32(const ConstTensorView& view) {
  Floats values(static_cast<std::size_t>(view.num_elements()));
  std::size_t i = 0;
  for (std::int64_t r = 0; r < view.dim(0); ++r) {
    for (std::int64_t c = 0; c < view.dim(1); ++c) {
      values[i++] = element(view.data, view.dtype, r * view.stride(0) + c * view.stride(1));
    }
  }
  return values;
}

/// The given routing, or that of the given logits, or that of the layer's own router.
RoutingView reference_routing(const LayerRef& layer, const ForwardIo& io, const Floats& x,
                              std::int64_t tokens, Routing& storage) {
  if (io.routing.topk_ids != nullptr) return io.routing;
  const std::int32_t experts = layer.stack->num_experts();
  const std::int64_t hidden = layer.stack->shape().hidden_size;
  Floats logits;
  ConstTensorView view = io.logits;
  if (view.data == nullptr) {
    logits.resize(static_cast<std::size_t>(tokens * experts));
    for (std::int64_t t = 0; t < tokens; ++t) {
      for (std::int32_t e = 0; e < experts; ++e) {
        logits[static_cast<std::size_t>(t * experts + e)] = static_cast<float>(
            dot(x.data() + t * hidden, layer.router_weight->data() + e * hidden, hidden));
      }
    }
    view = ConstTensorView(logits.data(), DType::F32, {tokens, experts});
  }
  route(view, *layer.router, storage);
  return storage.view();
}

}  // namespace

void moe_forward_cpu(const LayerRef& layer, const ForwardIo& io) {
  const forward::CallSizes sizes =
      forward::check_forward("moe_forward_cpu", DeviceType::Cpu, layer, io);
  if (sizes.num_tokens == 0) return;
  const ExpertStack& stack = *layer.stack;
  const std::int64_t tokens = sizes.num_tokens, hidden = stack.shape().hidden_size;
  const Floats x = to_f32(io.x);
  Routing storage;
  const RoutingView routing = reference_routing(layer, io, x, tokens, storage);
  if (io.routing_out.topk_ids != nullptr) {
    const auto pairs = static_cast<std::size_t>(sizes.num_pairs);
    std::memmove(io.routing_out.topk_ids, routing.topk_ids, pairs * sizeof(std::int32_t));
    std::memmove(io.routing_out.topk_weights, routing.topk_weights, pairs * sizeof(float));
  }

  // Expert by expert, so that each is decoded once; a row per pair.
  Floats rows(static_cast<std::size_t>(sizes.num_pairs * hidden));
  for (std::int32_t e = 0; e < stack.num_experts(); ++e) {
    std::optional<DenseExpert> expert;
    for (std::int64_t pair = 0; pair < sizes.num_pairs; ++pair) {
      if (routing.topk_ids[pair] != e) continue;
      if (!expert) expert.emplace(stack, layer.activation, e);
      expert->apply(x.data() + pair / sizes.top_k * hidden, rows.data() + pair * hidden);
    }
  }
  Floats shared_rows, shared_weights;
  if (layer.shared != nullptr) {
    shared_rows.resize(static_cast<std::size_t>(tokens * hidden));
    shared_weights.assign(static_cast<std::size_t>(tokens), 1.0F);
    DenseExpert expert(layer.shared->stack, layer.activation, 0);
    for (std::int64_t t = 0; t < tokens; ++t) {
      expert.apply(x.data() + t * hidden, shared_rows.data() + t * hidden);
      if (layer.shared->gate.empty()) continue;
      const double logit = dot(layer.shared->gate.data(), x.data() + t * hidden, hidden);
      shared_weights[static_cast<std::size_t>(t)] =
          static_cast<float>(1.0 / (1.0 + std::exp(-logit)));
    }
  }

  // The weighted sum in slot order, shared experts last.
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t h = 0; h < hidden; ++h) {
      const std::int64_t at = t * io.out.stride(0) + h * io.out.stride(1);
      double sum =
          io.accumulate ? static_cast<double>(element(io.out.data, io.out.dtype, at)) : 0.0;
      for (std::int32_t slot = 0; slot < sizes.top_k; ++slot) {
        const std::int64_t pair = t * sizes.top_k + slot;
        if (routing.topk_ids[pair] < 0) continue;
        sum += static_cast<double>(routing.topk_weights[pair]) *
               static_cast<double>(rows[static_cast<std::size_t>(pair * hidden + h)]);
      }
      if (!shared_rows.empty()) {
        sum += static_cast<double>(shared_weights[static_cast<std::size_t>(t)]) *
               static_cast<double>(shared_rows[static_cast<std::size_t>(t * hidden + h)]);
      }
      set_element(io.out.data, io.out.dtype, at, static_cast<float>(sum));
    }
  }
}

}  // namespace moesaic
