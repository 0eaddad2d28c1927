#pragma once

/// GPTQ checkpoints of random tensors for tests, with each matrix kept unpacked beside it.

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic::testing {

/// Which groups the columns of a matrix belong to.
enum class Order { Plain, Permuted, Random };

/// A GPTQ checkpoint of random tensors, with each matrix kept unpacked beside it.
struct Checkpoint {
  std::int32_t experts;
  std::int64_t k, n, group_size, groups;
  CheckpointFormat format = CheckpointFormat::Gptq;
  std::vector<std::uint32_t> qweight, qzeros;
  std::vector<float> scales;  ///< f16 values unless f32_scales
  std::vector<std::uint16_t> half_scales;
  std::vector<std::int32_t> g_idx;  ///< [orders, K]
  bool f32_scales = false, shared_order = true;
  std::vector<Int4Matrix> matrices;

  GptqTensors tensors() const {
    GptqTensors t;
    const bool awq = format == CheckpointFormat::Awq;
    const std::int64_t e = experts;
    const bool rows_first = format == CheckpointFormat::PackQuantized;
    t.qweight = awq ? ConstTensorView(qweight.data(), DType::I32, {e, k, n / 8})
                    : ConstTensorView(qweight.data(), DType::I32, {e, k / 8, n});
    t.scales = f32_scales ? ConstTensorView(scales.data(), DType::F32, {e, groups, n})
                          : ConstTensorView(half_scales.data(), DType::F16, {e, groups, n});
    if (!qzeros.empty()) {
      t.qzeros = ConstTensorView(qzeros.data(), DType::I32, {e, groups, (n + 7) / 8});
    }
    if (!g_idx.empty()) {
      t.g_idx = shared_order ? ConstTensorView(g_idx.data(), DType::I32, {k})
                             : ConstTensorView(g_idx.data(), DType::I32, {e, k});
    }
    if (rows_first) {
      const std::int64_t zero_words = (n + 7) / 8;
      t.qweight = ConstTensorView(qweight.data(), DType::I32, {e, n, k / 8});
      t.scales.shape = {e, n, groups, 0};
      t.scales.strides = {n * groups, groups, 1, 0};
      if (!qzeros.empty())
        t.qzeros = ConstTensorView(qzeros.data(), DType::I32, {e, zero_words, groups});
    }
    t.group_size = group_size == k ? -1 : group_size;
    t.format = format;
    return t;
  }
};

struct Recipe {
  std::int32_t experts = 3;
  std::int64_t k = 128, n = 48, group_size = 32;
  bool zeros = true;
  Order order = Order::Plain;
  bool shared_order = true;
  bool f32_scales = false;
  CheckpointFormat format = CheckpointFormat::Gptq;
};

/// Nibble of column c in an AWQ word.
inline constexpr int kAwqNibble[8] = {0, 4, 1, 5, 2, 6, 3, 7};

inline Checkpoint make_checkpoint(const Recipe& r, std::uint32_t seed = 1) {
  Random random(seed);
  Checkpoint c;
  c.experts = r.experts;
  c.k = r.k;
  c.n = r.n;
  c.group_size = r.group_size < 0 ? r.k : r.group_size;
  c.groups = (c.k + c.group_size - 1) / c.group_size;
  c.format = r.format;
  c.f32_scales = r.f32_scales;
  c.shared_order = r.shared_order;
  const bool awq = r.format == CheckpointFormat::Awq;
  std::vector<std::int32_t> order;
  for (std::int32_t e = 0; e < r.experts; ++e) {
    if (r.order != Order::Plain && (e == 0 || !r.shared_order)) {
      order.resize(static_cast<std::size_t>(c.k));
      for (std::int64_t i = 0; i < c.k; ++i)
        order[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i / c.group_size);
      if (r.order == Order::Permuted) {
        random.shuffle(order);
      } else {
        for (auto& g : order) g = random.below(c.groups);
      }
      c.g_idx.insert(c.g_idx.end(), order.begin(), order.end());
    }
    Int4Matrix m;
    m.k = c.k;
    m.n = c.n;
    m.group_size = c.group_size;
    m.groups = c.groups;
    m.g_idx = order;
    for (std::int64_t i = 0; i < c.k * c.n; ++i)
      m.codes.push_back(static_cast<std::uint8_t>(random.below(16)));
    for (std::int64_t i = 0; i < c.groups * c.n; ++i) {
      const float s = (0.2F + static_cast<float>(random.below(1000)) / 1000.0F) /
                      (8.0F * std::sqrt(static_cast<float>(c.k)));
      m.scales.push_back(r.f32_scales ? s : f16_to_f32(f32_to_f16(s)));
      m.zeros.push_back(static_cast<std::uint8_t>(
          !r.zeros ? 8 : random.below(16) + (r.format == CheckpointFormat::Gptq ? 1 : 0)));
    }
    // Scales of groups without columns are not kept.
    std::vector<bool> used(static_cast<std::size_t>(c.groups));
    for (std::int64_t i = 0; i < c.k; ++i) used[static_cast<std::size_t>(m.group_of(i))] = true;
    std::vector<std::uint32_t> words(
        static_cast<std::size_t>(awq ? c.k * (c.n / 8) : c.k / 8 * c.n));
    for (std::int64_t k = 0; k < c.k; ++k) {
      for (std::int64_t n = 0; n < c.n; ++n) {
        const std::uint32_t code = m.codes[static_cast<std::size_t>(k * c.n + n)];
        if (r.format == CheckpointFormat::PackQuantized) {
          words[static_cast<std::size_t>(n * (c.k / 8) + k / 8)] |= code << 4 * (k % 8);
        } else if (awq) {
          words[static_cast<std::size_t>(k * (c.n / 8) + n / 8)] |= code << 4 * kAwqNibble[n % 8];
        } else {
          words[static_cast<std::size_t>(k / 8 * c.n + n)] |= code << 4 * (k % 8);
        }
      }
    }
    c.qweight.insert(c.qweight.end(), words.begin(), words.end());
    const std::int64_t zero_words = (c.n + 7) / 8;
    std::vector<std::uint32_t> zeros(static_cast<std::size_t>(c.groups * zero_words));
    for (std::int64_t g = 0; g < c.groups; ++g) {
      for (std::int64_t n = 0; n < c.n; ++n) {
        const std::uint32_t stored = m.zeros[static_cast<std::size_t>(g * c.n + n)] -
                                     (r.format == CheckpointFormat::Gptq ? 1U : 0U);
        zeros[static_cast<std::size_t>(r.format == CheckpointFormat::PackQuantized
                                           ? n / 8 * c.groups + g
                                           : g * zero_words + n / 8)] |=
            stored << 4 * (awq ? kAwqNibble[n % 8] : n % 8);
      }
    }
    c.qzeros.insert(c.qzeros.end(), zeros.begin(), zeros.end());
    for (std::int64_t i = 0; i < c.groups * c.n; ++i) {
      const bool rows_first = r.format == CheckpointFormat::PackQuantized;
      const std::int64_t at = rows_first ? i % c.groups * c.n + i / c.groups : i;
      c.scales.push_back(m.scales[static_cast<std::size_t>(at)]);
      c.half_scales.push_back(f32_to_f16(c.scales.back()));
    }
    for (std::int64_t i = 0; i < c.groups * c.n; ++i) {
      if (used[static_cast<std::size_t>(i / c.n)]) continue;
      m.scales[static_cast<std::size_t>(i)] = 0.0F;
      m.zeros[static_cast<std::size_t>(i)] = 8;
    }
    c.matrices.push_back(std::move(m));
  }
  return c;
}

inline std::vector<Recipe> recipes() {
  std::vector<Recipe> all = {
      {},
      {.k = 256, .n = 64, .group_size = 64, .zeros = false},
      {.k = 512, .n = 80, .group_size = 128},
      {.k = 384, .n = 64, .group_size = -1, .zeros = false},
      {.k = 384, .n = 64, .group_size = -1},
      {.k = 256, .n = 64, .group_size = 128, .order = Order::Permuted},
      {.k = 256, .n = 64, .group_size = 64, .order = Order::Permuted, .shared_order = false},
      {.k = 256, .n = 40, .group_size = 32, .order = Order::Random, .shared_order = false},
      {.k = 192, .n = 33, .group_size = 64, .order = Order::Random},
      {.k = 40, .n = 7, .group_size = 32},
      {.k = 8, .n = 3, .group_size = -1},
      {.k = 96, .n = 24, .group_size = 32, .f32_scales = true},
      {.k = 160,
       .n = 32,
       .group_size = 128,
       .f32_scales = true,
       .format = CheckpointFormat::GptqV2},
      {.k = 256, .n = 72, .group_size = 128, .format = CheckpointFormat::Awq},
      {.k = 104, .n = 16, .group_size = 64, .format = CheckpointFormat::Awq},
      {.k = 128,
       .n = 44,
       .group_size = 32,
       .order = Order::Permuted,
       .format = CheckpointFormat::PackQuantized},
  };
  return all;
}

inline std::string describe_recipe(const Recipe& r) {
  return "k " + std::to_string(r.k) + " n " + std::to_string(r.n) + " group " +
         std::to_string(r.group_size) + (r.zeros ? " zeros" : "") + " order " +
         std::to_string(static_cast<int>(r.order)) + (r.shared_order ? "" : " per expert") +
         (r.f32_scales ? " f32 " : " f16 ") + name_of(r.format);
}

/// A case of these sizes for make_routing.
inline Case int4_case(std::int64_t tokens, std::int64_t hidden, std::int64_t intermediate,
                      std::int32_t experts, std::int32_t top_k,
                      RoutingShape routing = RoutingShape::Uniform) {
  const QuantType type = QuantType::INT4;
  return {"marlin", tokens, hidden, intermediate, experts, top_k, type, type, type, routing};
}

/// y = W x of one expert in f64.
inline Doubles apply_f64(const Int4Matrix& m, const double* x) {
  Doubles y(static_cast<std::size_t>(m.n));
  for (std::int64_t k = 0; k < m.k; ++k) {
    for (std::int64_t n = 0; n < m.n; ++n) {
      y[static_cast<std::size_t>(n)] += static_cast<double>(m.value(k, n)) * x[k];
    }
  }
  return y;
}

}  // namespace moesaic::testing
