#pragma once

/// Layers and routings for tests, made from the case list, and their results in f64.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <vector>

#include "../cases/cases.hpp"
#include "activate_f64.hpp"
#include "compare.hpp"
#include "dot_f64.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/forward.hpp"
#include "random.hpp"
#include "tensor.hpp"

namespace moesaic::testing {

using cases::Case;
using cases::RoutingShape;

/// One role as stored bytes (encoded values, or bytes of a type without an encoder), and decoded.
struct TestRole {
  std::shared_ptr<std::vector<std::byte>> bytes;
  Floats decoded;  ///< [E, rows, cols]
  RoleWeights weights;
};

/// A bias per row and a factor per expert.
inline void add_epilogue(TestRole& role, std::uint32_t seed) {
  const WeightRef& ref = role.weights.ref;
  role.weights.bias =
      std::make_shared<const Floats>(random_values(ref.num_experts * ref.rows, seed + 50, 0.3F));
  role.weights.scale = std::make_shared<const Floats>(random_factors(ref.num_experts, seed + 60));
}

/// A low-rank term of every expert.
inline void add_delta(TestRole& role, std::int64_t rank, std::uint32_t seed) {
  const WeightRef& ref = role.weights.ref;
  LowRankDelta delta;
  delta.rank = rank;
  delta.scale = 0.5F;
  delta.a = random_values(ref.num_experts * rank * ref.cols, seed + 70, 0.1F);
  delta.b = random_values(ref.num_experts * ref.rows * rank, seed + 80, 0.3F);
  role.weights.delta = std::make_shared<const LowRankDelta>(std::move(delta));
}

/// Overwrites the scales of a block of random bytes with small ones, which files could hold.
inline void set_scales(QuantType type, std::byte* block, Random& random) {
  const auto half = [&] {
    return f32_to_f16(0.01F + 0.001F * static_cast<float>(random.below(32)));
  };
  const auto put_half = [&](int offset) {
    const std::uint16_t h = half();
    std::memcpy(block + offset, &h, 2);
  };
  switch (type) {
    case QuantType::IQ1_M: {
      // The top nibbles of four words make an f16.
      const std::uint16_t h = half();
      for (int i = 0; i < 4; ++i) {
        std::byte& top = block[48 + 2 * i + 1];
        top = (top & std::byte{0x0F}) | static_cast<std::byte>((h >> (4 * i) & 15) << 4);
      }
      break;
    }
    case QuantType::TQ1_0:
      put_half(52);
      break;
    case QuantType::TQ2_0:
      put_half(64);
      break;
    default:
      put_half(0);
  }
}

/// Types whose encoders take long or leave codes out: tests give them random bytes.
inline bool quick_codes(QuantType type) {
  return traits(type).bits_per_weight() < 3.5 && type != QuantType::Q2_K && type != QuantType::Q3_K;
}

/// [experts, rows, cols] in the order of a file. Weights are normal with deviation 1 / sqrt(cols);
/// some types get random bytes instead, which reach every code. `epilogue` adds biases and
/// factors.
inline TestRole make_role(std::int32_t experts, std::int64_t rows, std::int64_t cols,
                          QuantType type, std::uint32_t seed, bool epilogue) {
  TestRole role;
  const std::int64_t stride = row_bytes(type, cols);
  role.bytes =
      std::make_shared<std::vector<std::byte>>(static_cast<std::size_t>(experts * rows * stride));
  role.decoded.resize(static_cast<std::size_t>(experts * rows * cols));
  Random random(seed);
  Floats values(static_cast<std::size_t>(cols));
  for (std::int64_t r = 0; r < experts * rows; ++r) {
    std::byte* at = role.bytes->data() + r * stride;
    if (!quick_codes(type)) {
      for (float& v : values) v = random.normal(1.0F / std::sqrt(static_cast<float>(cols)));
      quantize_row(type, values.data(), at, cols);
    } else {
      for (std::int64_t i = 0; i < stride; ++i) at[i] = random.byte();
      for (std::int64_t i = 0; i < stride; i += traits(type).block_bytes) {
        set_scales(type, at + i, random);
      }
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
  if (epilogue) add_epilogue(role, seed);
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
  /// As the backend prepares it; as stored without a backend.
  ExpertStack stack(const Backend* backend = nullptr,
                    StackLayout layout = StackLayout::Auto) const {
    ExpertStack::Parts p = parts();
    LoadOptions options;
    options.backend = backend;
    options.layout = layout;
    if (backend != nullptr) backend->prepare(p, options);
    return ExpertStack(std::move(p));
  }
};

/// Experts for every token of a case, and positive weights that do not add up to 1.
inline Routing make_routing(const Case& c, std::uint32_t seed = 7) {
  Routing routing(c.tokens, c.top_k);
  Random random(seed);
  for (std::int64_t t = 0; t < c.tokens; ++t) {
    std::vector<std::pair<float, std::int32_t>> order;
    for (std::int32_t e = 0; e < c.experts; ++e) {
      float key = random.uniform();
      if (c.routing == RoutingShape::Zipf) key *= static_cast<float>(1 + e);
      if (c.routing == RoutingShape::AllToOne && e == c.experts - 1) key = -1.0F;
      if (c.routing == RoutingShape::EmptyExperts && e >= c.experts / 2) key += 2.0F;
      order.emplace_back(key, e);
    }
    std::sort(order.begin(), order.end());
    for (std::int32_t s = 0; s < c.top_k; ++s) {
      const auto pair = static_cast<std::size_t>(t * c.top_k + s);
      const bool skip = c.routing == RoutingShape::Skipped && (t == 0 || random.uniform() < 0.3F);
      routing.topk_ids()[pair] = skip ? -1 : order[static_cast<std::size_t>(s)].second;
      routing.topk_weights()[pair] = 0.1F + random.uniform();
    }
  }
  return routing;
}

/// y = (W x) * scale + bias of one expert, in f64 on the decoded weights.
inline Doubles apply_f64(const TestRole& role, std::int32_t expert, const double* x) {
  const WeightRef& ref = role.weights.ref;
  Doubles y(static_cast<std::size_t>(ref.rows));
  Doubles low_rank;  // A x
  const LowRankDelta* const delta = role.weights.delta.get();
  for (std::int64_t r = 0; delta != nullptr && r < delta->rank; ++r) {
    const float* const a = delta->a.data() + (expert * delta->rank + r) * ref.cols;
    low_rank.push_back(static_cast<double>(delta->scale) * dot_f64(a, x, ref.cols));
  }
  for (std::int64_t r = 0; r < ref.rows; ++r) {
    double sum = dot_f64(role.decoded.data() + (expert * ref.rows + r) * ref.cols, x, ref.cols);
    if (role.weights.scale) {
      sum *= static_cast<double>((*role.weights.scale)[static_cast<std::size_t>(expert)]);
    }
    if (role.weights.bias) {
      sum += static_cast<double>(
          (*role.weights.bias)[static_cast<std::size_t>(expert * ref.rows + r)]);
    }
    if (delta != nullptr) {
      const float* const b = delta->b.data() + (expert * ref.rows + r) * delta->rank;
      sum += dot_f64(b, low_rank.data(), delta->rank);
    }
    y[static_cast<std::size_t>(r)] = sum;
  }
  return y;
}

/// The hidden row of one expert: activation(gate x, up x).
inline Doubles hidden_f64(const TestLayer& layer, std::int32_t expert, const double* x) {
  Doubles up = apply_f64(layer.up, expert, x);
  const Doubles gate =
      layer.activation.gated() ? apply_f64(layer.gate, expert, x) : Doubles(up.size());
  for (std::size_t i = 0; i < up.size(); ++i) {
    up[i] = activate_f64(layer.activation, gate[i], up[i]);
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

/// y += the shared expert's output for x, times sigmoid(gate . x) where there is a gate.
inline void add_shared_f64(const TestLayer& shared, const Floats& gate, const Floats& x,
                           Doubles& y) {
  const std::int64_t hidden = shared.shape.hidden;
  Routing all(static_cast<std::int64_t>(x.size()) / hidden, 1);
  for (std::int64_t t = 0; t < all.num_tokens(); ++t) {
    const auto token = static_cast<std::size_t>(t);
    all.topk_ids()[token] = 0;
    all.topk_weights()[token] = 1.0F;
    if (gate.empty()) continue;
    const double logit = dot_f64(gate.data(), x.data() + t * hidden, hidden);
    all.topk_weights()[token] = static_cast<float>(1.0 / (1.0 + std::exp(-logit)));
  }
  const Doubles more = forward_f64(shared, x, all);
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += more[i];
}

}  // namespace moesaic::testing
