// Runs products on the emulated device, and says what f64 makes of them.
#pragma once

#include <gtest/gtest.h>

#include <stdexcept>

#include "gemm_case.hpp"
#include "seeds.hpp"

namespace moesaic::testing {

inline constexpr double kExactBound = 1e-5;  // of the norm, f32 x in 16 bits
inline constexpr double kFastBound = 4e-3;   // f32 x in 8 bits
// silu(gate) * up has the errors of two products, which add in squares. Over 12 seeds a format's
// error is 2.1e-3 to 2.8e-3 in the mean, and 5.1e-3 once, where a few large gates decide the norm.
inline constexpr double kFusedFastBound = 1.42 * kFastBound;
inline constexpr double kRoundedBound = 3e-6;  // 16-bit x, which is multiplied as it is

inline Routing routing_of(std::int32_t experts, std::int64_t tokens, std::int32_t top_k,
                          RoutingShape shape) {
  Case c{};
  c.experts = experts;
  c.tokens = tokens;
  c.top_k = top_k;
  c.routing = shape;
  return make_routing(c);
}

struct Answer {
  Doubles values;
  Doubles magnitude;  // sum |w| |x| of each element; empty: the norm alone is judged
};

// [limit, rows] of NaN where the map names no row.
inline Answer product_f64(const TestRole& role, const Map& map, const Input& in) {
  const WeightRef& ref = role.weights.ref;
  const auto size = static_cast<std::size_t>(map.facts.limit * ref.rows);
  Answer answer{Doubles(size, std::nan("")), Doubles(size, 0.0)};
  map.for_each(ref.num_experts, [&](std::int32_t e, std::int64_t from, std::int64_t to) {
    const float* x = in.values.data() + from * ref.cols;
    const Doubles wide(x, x + ref.cols);
    const Doubles y = apply_f64(role, e, wide.data());
    for (std::int64_t r = 0; r < ref.rows; ++r) {
      const auto at = static_cast<std::size_t>(to * ref.rows + r);
      const float* w = role.decoded.data() + (e * ref.rows + r) * ref.cols;
      answer.values[at] = y[static_cast<std::size_t>(r)];
      for (std::int64_t i = 0; i < ref.cols; ++i) {
        answer.magnitude[at] += std::abs(static_cast<double>(w[i] * x[i]));
      }
    }
  });
  return answer;
}

inline Floats run_gemm(const RoleRef& weight, const WeightRef& ref, const Map& map, const Input& in,
                       bool exact, std::uint64_t seed, bool batch_invariant = false) {
  Floats out(static_cast<std::size_t>(map.facts.limit * ref.rows), kPoison);
  const Scratch scratch(map, in.rows.num_rows, ref, false);
  emulation::options().seed = seed;
  EXPECT_EQ(cuda::launch_gemm({.weight = weight,
                               .map = map.view(),
                               .in = in.rows,
                               .out = out.data(),
                               .precision = exact ? Precision::Exact : Precision::Fast,
                               .batch_invariant = batch_invariant,
                               .scratch = scratch.data()},
                              nullptr),
            cuda::kOk);
  return out;
}

inline void expect_near(const Floats& got, const Answer& want, double bound,
                        const std::string& what) {
  EXPECT_LT(relative_error(got, want.values), bound) << what;
  if (!want.magnitude.empty()) {
    EXPECT_LT(largest_error(got, want.values, want.magnitude), bound) << what;
  }
}

inline void expect_same_bits(const Floats& a, const Floats& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  EXPECT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0) << what;
}

inline Format format_named(const std::string& name) {
  for (const Format& format : all_formats()) {
    if (format.name == name) return format;
  }
  throw std::invalid_argument(name);
}

// Races do not depend on the format: under the checker one of each kind will do.
inline std::vector<Format> formats_to_run() {
  if (!emulation::race_checked()) return all_formats();
  return {format_named("q4_k"), format_named("f32"), format_named("int4_g64_orders")};
}

// gate and up as one launch sees them: in shared units, each alone, or up only.
enum class Units { Shared, Separate, Ungated };

struct GateUp {
  TestLayer layer;
  PackedRole gate, up;
  Units units;

  GateUp(const Format& gate_format, const Format& up_format, Units how, ActivationKind kind,
         std::int32_t experts, std::int64_t rows, std::int64_t cols)
      : layer(no_roles(experts, rows, cols, kind)), units(how) {
    layer.up = make_format_role(up_format, experts, rows, cols, 31, true);
    if (how != Units::Ungated) {
      layer.gate = make_format_role(gate_format, experts, rows, cols, 32, true);
      gate = pack_role(layer.gate, how == Units::Shared ? &layer.up : nullptr);
    }
    up = how == Units::Shared ? second_half(gate, layer.up) : pack_role(layer.up);
  }

  // `factors`: of the products, by destination; empty: none.
  Floats run(const Map& map, const Input& in, bool exact, std::uint64_t seed,
             const Floats& factors = {}) const {
    Floats hidden(static_cast<std::size_t>(map.facts.limit * up.ref.rows), kPoison);
    const Scratch scratch(map, in.rows.num_rows, up.ref, units == Units::Separate);
    emulation::options().seed = seed;
    EXPECT_EQ(cuda::launch_gate_up({.gate = units == Units::Ungated ? RoleRef{} : gate.view(),
                                    .up = up.view(),
                                    .activation = layer.activation,
                                    .map = map.view(),
                                    .in = in.rows,
                                    .hidden = hidden.data(),
                                    .precision = exact ? Precision::Exact : Precision::Fast,
                                    .row_weight = factors.empty() ? nullptr : factors.data(),
                                    .scratch = scratch.data()},
                                   nullptr),
              cuda::kOk);
    return hidden;
  }

  Answer answer(const Map& map, const Input& in, const Floats& factors = {}) const {
    const std::int64_t rows = up.ref.rows, cols = up.ref.cols;
    const auto size = static_cast<std::size_t>(map.facts.limit * rows);
    Answer a{Doubles(size, std::nan("")), {}};
    map.for_each(up.ref.num_experts, [&](std::int32_t e, std::int64_t from, std::int64_t to) {
      const float* x = in.values.data() + from * cols;
      Doubles row(x, x + cols);
      if (!factors.empty()) {
        for (double& v : row) v *= static_cast<double>(factors[static_cast<std::size_t>(to)]);
      }
      const Doubles h = hidden_f64(layer, e, row.data());
      std::copy(h.begin(), h.end(), a.values.begin() + to * rows);
    });
    return a;
  }

 private:
  // hidden_f64 needs the activation and the roles, nothing else.
  static TestLayer no_roles(std::int32_t experts, std::int64_t rows, std::int64_t cols,
                            ActivationKind kind) {
    Case c{};
    c.experts = experts;
    c.intermediate = rows;
    c.hidden = cols;
    c.activation = kind;
    c.gate = c.up = c.down = QuantType::F32;
    return TestLayer(c);
  }
};

}  // namespace moesaic::testing
