#pragma once

/// Layers, routings and oracles for tests, made from the case list.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "../cases/cases.hpp"
#include "dot_f64.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/forward.hpp"

namespace moesaic::testing {

using cases::Case;
using cases::RoutingShape;
using Floats = std::vector<float>;
using Doubles = std::vector<double>;

inline constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

inline Floats random_values(std::int64_t count, std::uint32_t seed, float scale = 1.0F) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal(0.0F, scale);
  Floats values(static_cast<std::size_t>(count));
  for (float& v : values) v = normal(generator);
  return values;
}

/// One role as stored bytes (encoded values, or bytes of a type without an encoder), and decoded.
struct TestRole {
  std::shared_ptr<std::vector<std::byte>> bytes;
  Floats decoded;  ///< [E, rows, cols]
  RoleWeights weights;
};

inline TestRole make_role(std::int32_t experts, std::int64_t rows, std::int64_t cols,
                          QuantType type, std::uint32_t seed, bool epilogue) {
  TestRole role;
  const std::int64_t stride = row_bytes(type, cols);
  role.bytes =
      std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(experts * rows * stride));
  role.decoded.resize(static_cast<std::size_t>(experts * rows * cols));
  std::mt19937 generator(seed);  // bytes below 0x40, so that every f16 scale is below 2
  const Floats values =
      random_values(experts * rows * cols, seed, 1.0F / std::sqrt(static_cast<float>(cols)));
  for (std::int64_t r = 0; r < experts * rows; ++r) {
    std::byte* at = role.bytes->data() + r * stride;
    if (has_encoder(type)) {
      quantize_row(type, values.data() + r * cols, at, cols);
    } else {
      for (std::int64_t i = 0; i < stride; ++i) at[i] = std::byte(generator() & 0x3FU);
    }
    dequantize_row(type, at, role.decoded.data() + r * cols, cols);
  }
  role.weights.ref = {.base = role.bytes->data(),
                      .table = nullptr,
                      .expert_stride = rows * stride,
                      .row_stride = stride,
                      .num_experts = experts,
                      .rows = rows,
                      .cols = cols,
                      .type = type,
                      .layout = WeightLayout::Rows,
                      .slot_map = nullptr};
  role.weights.owner = role.bytes;
  if (epilogue) {
    role.weights.bias =
        std::make_shared<const Floats>(random_values(experts * rows, seed + 50, 0.3F));
    Floats scale = random_values(experts, seed + 60, 0.2F);
    for (float& s : scale) s += 1.0F;
    role.weights.scale = std::make_shared<const Floats>(std::move(scale));
  }
  return role;
}

/// All weights of a role, [E, rows, cols], whatever its layout.
inline Floats decode_role(const RoleWeights& role) {
  const WeightRef& ref = role.ref;
  Floats out(static_cast<std::size_t>(ref.num_experts * ref.rows * ref.cols), kPoison);
  for (std::int32_t e = 0; e < ref.num_experts; ++e) {
    for (std::int64_t r = 0; r < ref.rows; ++r) {
      dequantize_expert_row(ref, e, r, out.data() + (e * ref.rows + r) * ref.cols);
    }
  }
  return out;
}

/// A case's layer: stored and decoded roles, from which stacks for any backend are made.
struct TestLayer {
  Case shape;
  Activation activation;
  TestRole gate, up, down;

  explicit TestLayer(const Case& c, std::uint32_t seed = 1) : shape(c) {
    activation.kind = c.activation;
    if (activation.gated()) {
      gate = make_role(c.experts, c.intermediate, c.hidden, c.gate, seed, c.epilogue);
    }
    up = make_role(c.experts, c.intermediate, c.hidden, c.up, seed + 1, c.epilogue);
    down = make_role(c.experts, c.hidden, c.intermediate, c.down, seed + 2, c.epilogue);
  }

  ExpertStack::Parts parts() const {
    ExpertStack::Parts parts;
    parts.shape = {shape.experts, shape.hidden, shape.intermediate};
    parts.gate = gate.weights;
    parts.up = up.weights;
    parts.down = down.weights;
    return parts;
  }
  /// In the backend's own layout; as stored without a backend.
  ExpertStack stack(const Backend* backend = nullptr) const {
    ExpertStack::Parts p = parts();
    LoadOptions options;
    options.backend = backend;
    if (backend != nullptr) backend->prepare(p, options);
    return ExpertStack(std::move(p));
  }
};

inline Routing make_routing(const Case& c, std::uint32_t seed = 7) {
  Routing routing(c.tokens, c.top_k);
  std::mt19937 generator(seed);
  std::uniform_real_distribution<float> uniform(0.0F, 1.0F);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    std::vector<std::pair<float, std::int32_t>> order;
    for (std::int32_t e = 0; e < c.experts; ++e) {
      float key = uniform(generator);
      if (c.routing == RoutingShape::Zipf) key *= static_cast<float>(1 + e);
      if (c.routing == RoutingShape::AllToOne && e == c.experts - 1) key = -1.0F;
      if (c.routing == RoutingShape::EmptyExperts && e >= c.experts / 2) key += 2.0F;
      order.emplace_back(key, e);
    }
    std::sort(order.begin(), order.end());
    for (std::int32_t s = 0; s < c.top_k; ++s) {
      const auto pair = static_cast<std::size_t>(t * c.top_k + s);
      const bool skip = c.routing == RoutingShape::Skipped && (t == 0 || uniform(generator) < 0.3F);
      routing.topk_ids()[pair] = skip ? -1 : order[static_cast<std::size_t>(s)].second;
      routing.topk_weights()[pair] = 0.1F + uniform(generator);
    }
  }
  return routing;
}

/// y = (W x) * scale + bias of one expert, in f64 on the decoded weights.
inline Doubles apply_f64(const TestRole& role, std::int32_t expert, const double* x) {
  const WeightRef& ref = role.weights.ref;
  Doubles y(static_cast<std::size_t>(ref.rows));
  for (std::int64_t r = 0; r < ref.rows; ++r) {
    double sum = dot_f64(role.decoded.data() + (expert * ref.rows + r) * ref.cols, x, ref.cols);
    if (role.weights.scale) {
      sum *= static_cast<double>((*role.weights.scale)[static_cast<std::size_t>(expert)]);
    }
    if (role.weights.bias) {
      sum += static_cast<double>(
          (*role.weights.bias)[static_cast<std::size_t>(expert * ref.rows + r)]);
    }
    y[static_cast<std::size_t>(r)] = sum;
  }
  return y;
}

inline Doubles hidden_f64(const TestLayer& layer, std::int32_t expert, const double* x) {
  Doubles up = apply_f64(layer.up, expert, x);
  const Doubles gate =
      layer.activation.gated() ? apply_f64(layer.gate, expert, x) : Doubles(up.size());
  for (std::size_t i = 0; i < up.size(); ++i) {
    if (layer.activation.kind == ActivationKind::SwiGlu) {
      up[i] *= gate[i] / (1.0 + std::exp(-gate[i]));
    } else {
      up[i] = static_cast<double>(
          activate(layer.activation, static_cast<float>(gate[i]), static_cast<float>(up[i])));
    }
  }
  return up;
}

/// The layer in f64, apart from every other implementation.
inline Doubles forward_f64(const TestLayer& layer, const Floats& x, const Routing& routing) {
  const std::int64_t hidden = layer.shape.hidden;
  Doubles y(x.size());
  for (std::int64_t t = 0; t < routing.num_tokens(); ++t) {
    const Doubles row(x.begin() + t * hidden, x.begin() + (t + 1) * hidden);
    for (std::int32_t s = 0; s < routing.top_k(); ++s) {
      const auto pair = static_cast<std::size_t>(t * routing.top_k() + s);
      const std::int32_t expert = routing.topk_ids()[pair];
      if (expert < 0) continue;
      const Doubles h = hidden_f64(layer, expert, row.data());
      const Doubles d = apply_f64(layer.down, expert, h.data());
      for (std::int64_t i = 0; i < hidden; ++i) {
        y[static_cast<std::size_t>(t * hidden + i)] +=
            static_cast<double>(routing.topk_weights()[pair]) * d[static_cast<std::size_t>(i)];
      }
    }
  }
  return y;
}

/// |a - b| / |b|; not a number when `a` holds one.
template <class A, class B>
double rel_l2(const std::vector<A>& a, const std::vector<B>& b) {
  double difference = 0.0, norm = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) {
    const double d = static_cast<double>(a[i]) - static_cast<double>(b[i]);
    difference += d * d;
    norm += static_cast<double>(b[i]) * static_cast<double>(b[i]);
  }
  return difference == 0.0 ? 0.0 : std::sqrt(difference / std::max(norm, 1e-300));
}

/// Elements in any dtype, poisoned or from f32.
struct Tensor {
  DType dtype;
  std::int64_t rows, cols;
  std::vector<std::byte> bytes;

  Tensor(DType type, std::int64_t r, std::int64_t c)
      : dtype(type), rows(r), cols(c), bytes(static_cast<std::size_t>(r * c) * size_of(type)) {
    std::fill(bytes.begin(), bytes.end(), std::byte{0xFF});  // NaN in every float type
  }
  Tensor(DType type, std::int64_t r, std::int64_t c, const Floats& values) : Tensor(type, r, c) {
    for (std::size_t i = 0; i < values.size(); ++i) set(i, values[i]);
  }
  void set(std::size_t i, float value) {
    if (dtype == DType::F32) {
      std::memcpy(bytes.data() + i * 4, &value, 4);
      return;
    }
    const std::uint16_t bits = dtype == DType::F16 ? f32_to_f16(value) : f32_to_bf16(value);
    std::memcpy(bytes.data() + i * 2, &bits, 2);
  }
  float get(std::size_t i) const {
    if (dtype == DType::F32) {
      float value;
      std::memcpy(&value, bytes.data() + i * 4, 4);
      return value;
    }
    std::uint16_t bits;
    std::memcpy(&bits, bytes.data() + i * 2, 2);
    return dtype == DType::F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
  }
  Floats values() const {
    Floats out(static_cast<std::size_t>(rows * cols));
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = get(i);
    return out;
  }
  TensorView view() { return {bytes.data(), dtype, {rows, cols}}; }
};

/// 64-byte aligned memory with guard bytes behind it.
class GuardedMemory {
 public:
  explicit GuardedMemory(std::size_t bytes) : bytes_(bytes), memory_(bytes + 2 * kGuard) {
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.data());
    data_ = memory_.data() + (kGuard - address % kGuard) % kGuard;
    std::fill(memory_.begin(), memory_.end(), std::byte{0xA5});
  }
  std::byte* data() { return data_; }
  bool guard_untouched() const {
    return std::all_of(data_ + bytes_, data_ + bytes_ + kGuard,
                       [](std::byte b) { return b == std::byte{0xA5}; });
  }

 private:
  static constexpr std::size_t kGuard = 64;
  std::size_t bytes_;
  std::vector<std::byte> memory_;
  std::byte* data_;
};

}  // namespace moesaic::testing
