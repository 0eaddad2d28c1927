#include <cmath>
#include <cstring>
#include <vector>

#include "forward/check_call.hpp"
#include "forward/parts.hpp"
#include "moesaic/forward.hpp"
#include "moesaic/interrupt.hpp"

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

/// scale * B A of one expert; empty without a low-rank term.
Floats low_rank_matrix(const RoleWeights& role, std::int32_t expert) {
  if (role.delta == nullptr) return {};
  const LowRankDelta& delta = *role.delta;
  const std::int64_t rows = role.ref.rows, cols = role.ref.cols, rank = delta.rank;
  Floats matrix(static_cast<std::size_t>(rows * cols));
  for (std::int64_t row = 0; row < rows; ++row) {
    Interrupt::check();
    const float* const b = delta.b.data() + (expert * rows + row) * rank;
    for (std::int64_t col = 0; col < cols; ++col) {
      double sum = 0.0;
      for (std::int64_t r = 0; r < rank; ++r) {
        const float a = delta.a[static_cast<std::size_t>((expert * rank + r) * cols + col)];
        sum += static_cast<double>(b[r]) * static_cast<double>(a);
      }
      matrix[static_cast<std::size_t>(row * cols + col)] =
          static_cast<float>(static_cast<double>(delta.scale) * sum);
    }
  }
  return matrix;
}

/// One role of one expert in f32: y = (W x) * scale + bias, plus the low-rank term.
struct DenseRole {
  std::int64_t rows, cols;
  Floats values;
  float scale = 1.0F;
  const float* bias = nullptr;
  Floats low_rank;

  DenseRole(const RoleWeights& role, std::int32_t expert)
      : rows(role.ref.rows),
        cols(role.ref.cols),
        values(static_cast<std::size_t>(role.ref.rows * role.ref.cols)),
        low_rank(low_rank_matrix(role, expert)) {
    for (std::int64_t row = 0; row < rows; ++row) {
      dequantize_expert_row(role.ref, expert, row, values.data() + row * cols);
    }
    if (role.scale) scale = (*role.scale)[static_cast<std::size_t>(expert)];
    if (role.bias) bias = role.bias->data() + expert * rows;
  }

  float apply(std::int64_t row, const float* x) const {
    double y = dot(values.data() + row * cols, x, cols) * static_cast<double>(scale);
    if (bias != nullptr) y += static_cast<double>(bias[row]);
    if (!low_rank.empty()) y += dot(low_rank.data() + row * cols, x, cols);
    return static_cast<float>(y);
  }
};

/// One expert's FFN: down(activation(gate x, up x)), x times `factor`.
class DenseExpert {
 public:
  DenseExpert(const ExpertStack& stack, const Activation& activation, std::int32_t expert)
      : activation_(activation),
        up_(stack.up(), expert),
        down_(stack.down(), expert),
        input_(static_cast<std::size_t>(up_.cols)),
        hidden_(static_cast<std::size_t>(up_.rows)) {
    if (stack.gated()) gate_.emplace(stack.gate(), expert);
  }

  void apply(const float* x, float factor, float* y) {
    for (std::int64_t h = 0; h < up_.cols; ++h) input_[static_cast<std::size_t>(h)] = factor * x[h];
    for (std::int64_t i = 0; i < up_.rows; ++i) {
      const float g = gate_ ? gate_->apply(i, input_.data()) : 0.0F;
      hidden_[static_cast<std::size_t>(i)] = activate(activation_, g, up_.apply(i, input_.data()));
    }
    for (std::int64_t h = 0; h < down_.rows; ++h) y[h] = down_.apply(h, hidden_.data());
  }

 private:
  Activation activation_;
  std::optional<DenseRole> gate_;
  DenseRole up_, down_;
  Floats input_, hidden_;
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

/// Rows of `cols` values, one per token.
struct Rows {
  Floats values;
  std::int64_t cols = 0;
  const float* row(std::int64_t t) const { return values.data() + t * cols; }
  float* row(std::int64_t t) { return values.data() + t * cols; }
  std::int64_t count() const { return static_cast<std::int64_t>(values.size()) / cols; }
};

Rows to_rows(const ConstTensorView& view) { return {to_f32(view), view.dim(1)}; }

Rows normed(const Rows& x, const RmsNorm* norm) {
  if (!forward::has_norm(norm)) return x;
  Rows out = x;
  for (std::int64_t t = 0; t < x.count(); ++t) {
    const double square = dot(x.row(t), x.row(t), x.cols) / static_cast<double>(x.cols);
    const double factor = 1.0 / std::sqrt(square + static_cast<double>(norm->eps));
    for (std::int64_t h = 0; h < x.cols; ++h) {
      out.row(t)[h] = static_cast<float>(static_cast<double>(x.row(t)[h]) * factor *
                                         static_cast<double>(norm->weight[h]));
    }
  }
  return out;
}

/// W x of one projection of latent experts.
Rows projected(const Rows& x, const RoleWeights& weights) {
  const DenseRole role(weights, 0);
  Rows out{Floats(static_cast<std::size_t>(x.count() * role.rows)), role.rows};
  for (std::int64_t t = 0; t < x.count(); ++t) {
    Interrupt::check();
    for (std::int64_t r = 0; r < role.rows; ++r) out.row(t)[r] = role.apply(r, x.row(t));
  }
  return out;
}

/// Router logits of what the router reads; `x` is what the experts read.
Floats own_logits(const LayerRef& layer, const ForwardIo& io, const Rows& x) {
  Rows input = x;
  if (io.router_input.data != nullptr) {
    input = to_rows(io.router_input);
  } else if (forward::has_norm(layer.router_norm)) {
    input = to_rows(io.x);
  }
  input = normed(input, layer.router_norm);
  Floats logits;
  for (std::int64_t t = 0; t < input.count(); ++t) {
    Interrupt::check();
    for (std::int32_t e = 0; e < layer.router_experts(); ++e) {
      const float* weight = layer.router_weight->data() + e * input.cols;
      logits.push_back(static_cast<float>(dot(input.row(t), weight, input.cols)));
    }
  }
  return logits;
}

/// The ids that came with the call.
void take_ids(const LayerRef& layer, const ForwardIo& io, Routing& to) {
  const auto* tokens = static_cast<const std::int32_t*>(io.token_ids.data);
  for (std::int64_t pair = 0; pair < to.num_tokens() * to.top_k(); ++pair) {
    const std::int64_t token = pair / to.top_k();
    to.topk_ids()[pair] = tokens == nullptr
                              ? io.routing.topk_ids[pair]
                              : layer.token_experts[tokens[token] * to.top_k() + pair % to.top_k()];
  }
}

/// The ready routing, or that of the given logits, or that of the layer's own router.
RoutingView reference_routing(const LayerRef& layer, const ForwardIo& io,
                              const forward::CallSizes& sizes, const Rows& x, Routing& storage) {
  if (sizes.ready_routing) return io.routing;
  if (layer.router->select_on == SelectOn::Given) {
    storage.resize(sizes.num_tokens, sizes.top_k);
    take_ids(layer, io, storage);
  }
  Floats logits;
  ConstTensorView view = io.logits;
  if (view.data == nullptr) {
    logits = own_logits(layer, io, x);
    view = ConstTensorView(logits.data(), DType::F32, {sizes.num_tokens, layer.router_experts()});
  }
  route(view, *layer.router, storage);
  return storage.view();
}

/// The weighted sums of the routed experts, in slot order; identity experts give `x`.
std::vector<double> routed_sums(const LayerRef& layer, const RoutingView& routing, const Rows& x) {
  const ExpertStack& stack = *layer.stack;
  const bool on_input = layer.weight_on() == WeightOn::Input;
  // Expert by expert, so that each is decoded once; a row per pair.
  Rows rows{Floats(static_cast<std::size_t>(routing.num_pairs() * x.cols)), x.cols};
  for (std::int32_t e = 0; e < stack.num_experts(); ++e) {
    std::optional<DenseExpert> expert;
    for (std::int64_t pair = 0; pair < routing.num_pairs(); ++pair) {
      if (routing.topk_ids[pair] != e) continue;
      Interrupt::check();
      if (!expert) expert.emplace(stack, layer.activation, e);
      expert->apply(x.row(pair / routing.top_k), on_input ? routing.topk_weights[pair] : 1.0F,
                    rows.row(pair));
    }
  }
  std::vector<double> sums(x.values.size());
  for (std::int64_t pair = 0; pair < routing.num_pairs(); ++pair) {
    const std::int32_t id = routing.topk_ids[pair];
    if (id < 0 || id >= stack.num_experts()) continue;
    const double weight = on_input ? 1.0 : static_cast<double>(routing.topk_weights[pair]);
    double* const sum = sums.data() + pair / routing.top_k * x.cols;
    for (std::int64_t h = 0; h < x.cols; ++h) {
      sum[h] += weight * static_cast<double>(rows.row(pair)[h]);
    }
  }
  return sums;
}

/// Adds x times the weights of the identity experts.
void add_identity(const LayerRef& layer, const RoutingView& routing, const Rows& x,
                  std::vector<double>& sums) {
  for (std::int64_t pair = 0; pair < routing.num_pairs(); ++pair) {
    if (routing.topk_ids[pair] < layer.stack->num_experts()) continue;
    const std::int64_t token = pair / routing.top_k;
    for (std::int64_t h = 0; h < x.cols; ++h) {
      sums[static_cast<std::size_t>(token * x.cols + h)] +=
          static_cast<double>(routing.topk_weights[pair]) * static_cast<double>(x.row(token)[h]);
    }
  }
}

void add_shared(const SharedExperts& shared, const Rows& x, std::vector<double>& sums) {
  DenseExpert expert(shared.stack, shared.activation, 0);
  Floats y(static_cast<std::size_t>(x.cols));
  for (std::int64_t t = 0; t < x.count(); ++t) {
    expert.apply(x.row(t), 1.0F, y.data());
    const double weight = shared.gate.empty()
                              ? 1.0
                              : 1.0 / (1.0 + std::exp(-dot(shared.gate.data(), x.row(t), x.cols)));
    for (std::int64_t h = 0; h < x.cols; ++h) {
      sums[static_cast<std::size_t>(t * x.cols + h)] +=
          weight * static_cast<double>(y[static_cast<std::size_t>(h)]);
    }
  }
}

/// The routed sums of latent experts at full width.
std::vector<double> latent_sums(const LayerRef& layer, const RoutingView& routing, const Rows& x) {
  const ExpertStack& projections = layer.latent->projections;
  const Rows narrow = projected(x, projections.up());
  const std::vector<double> sums = routed_sums(layer, routing, narrow);
  Rows sum{Floats(sums.begin(), sums.end()), narrow.cols};
  const Rows full = projected(normed(sum, &layer.latent->norm), projections.down());
  return {full.values.begin(), full.values.end()};
}

}  // namespace

void moe_forward_cpu(const LayerRef& layer, const ForwardIo& io) {
  const forward::CallSizes sizes = forward::check_forward("moe_forward_cpu", Device{}, layer, io);
  if (sizes.num_tokens == 0) return;
  const Rows x = normed(to_rows(io.x), layer.input_norm);
  Routing storage;
  const RoutingView routing = reference_routing(layer, io, sizes, x, storage);
  forward::check_kept("moe_forward_cpu", *layer.stack, routing);
  if (io.routing_out.topk_ids != nullptr) {
    const auto pairs = static_cast<std::size_t>(sizes.num_pairs);
    std::memmove(io.routing_out.topk_ids, routing.topk_ids, pairs * sizeof(std::int32_t));
    std::memmove(io.routing_out.topk_weights, routing.topk_weights, pairs * sizeof(float));
  }

  std::vector<double> sums =
      layer.latent != nullptr ? latent_sums(layer, routing, x) : routed_sums(layer, routing, x);
  add_identity(layer, routing, x, sums);
  if (layer.shared != nullptr) add_shared(*layer.shared, x, sums);
  for (std::int64_t t = 0; t < sizes.num_tokens; ++t) {
    for (std::int64_t h = 0; h < x.cols; ++h) {
      const std::int64_t at = t * io.out.stride(0) + h * io.out.stride(1);
      double y = sums[static_cast<std::size_t>(t * x.cols + h)];
      if (io.accumulate) y += static_cast<double>(element(io.out.data, io.out.dtype, at));
      set_element(io.out.data, io.out.dtype, at, static_cast<float>(y));
    }
  }
}

}  // namespace moesaic
