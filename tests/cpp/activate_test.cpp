// The scalar activations, and the kernels of every instruction set that runs here, against f64.

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <vector>

#include "activate_f64.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/isa.hpp"
#include "random.hpp"

namespace moesaic::testing {
namespace {

constexpr float kUntouched = -12345.0F;

struct Rows {
  std::vector<float> gate, up;
};

/// Normal values, and some far out.
Rows random_rows(std::size_t count, std::uint32_t seed) {
  Random random(seed);
  Rows rows;
  for (std::size_t i = 0; i < count; ++i) {
    const float far = i % 7 == 0 ? 20.0F : 1.0F;
    rows.gate.push_back(far * random.normal(3.0F));
    rows.up.push_back(random.normal(3.0F));
  }
  rows.gate[0] = 1e-6F;  // where a tangent by quotients loses its digits
  return rows;
}

std::vector<Activation> activations() {
  std::vector<Activation> all;
  for (int kind = 0; kind < cpu::kNumActivations; ++kind) {
    Activation a;
    a.kind = static_cast<ActivationKind>(kind);
    a.limit = 2.5F;
    a.beta = 4.0F;
    all.push_back(a);
    a.linear_beta = 5.0F;
    if (a.kind == ActivationKind::SiTu) all.push_back(a);
  }
  return all;
}

TEST(Activate, MatchesFormulas) {
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    Activation a;
    a.kind = static_cast<ActivationKind>(kind);
    for (const float linear_beta : {0.0F, 25.0F}) {
      a.beta = 4.0F;
      a.linear_beta = linear_beta;
      a.limit = 2.0F;
      for (const float g : {-100.0F, -8.0F, -1.5F, -0.1F, 0.0F, 0.3F, 1.9F, 2.1F, 30.0F, 200.0F}) {
        for (const float u : {-50.0F, -2.5F, -1.0F, 0.0F, 0.7F, 1.9F, 3.0F, 90.0F}) {
          const double want = activate_f64(a, static_cast<double>(g), static_cast<double>(u));
          EXPECT_NEAR(static_cast<double>(activate(a, g, u)), want, 3e-6 * (1 + std::abs(want)))
              << name_of(a.kind) << " g=" << g << " u=" << u;
        }
      }
    }
  }
}

TEST(Activate, StaysFiniteAndKeepsNaN) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (int kind = 0; kind <= static_cast<int>(ActivationKind::SiTu); ++kind) {
    Activation a;
    a.kind = static_cast<ActivationKind>(kind);
    EXPECT_TRUE(std::isfinite(activate(a, -1e30F, 1.0F))) << name_of(a.kind);
    EXPECT_TRUE(std::isfinite(activate(a, 1e15F, 1e15F))) << name_of(a.kind);
    EXPECT_TRUE(std::isnan(activate(a, 1.0F, nan))) << name_of(a.kind);
    EXPECT_EQ(std::isnan(activate(a, nan, 1.0F)), a.gated()) << name_of(a.kind);
  }
}

TEST(Activate, Names) {
  Activation a;
  EXPECT_STREQ(name_of(a.kind), "swiglu");
  EXPECT_TRUE(a.gated());
  a.kind = ActivationKind::ReluSquared;
  EXPECT_STREQ(name_of(a.kind), "relu_squared");
  EXPECT_FALSE(a.gated());
}

class ActivateKernels : public ::testing::TestWithParam<CpuIsa> {
 protected:
  /// hidden of `n` values, with two guards behind them.
  std::vector<float> run(const Activation& a, const Rows& rows, int n) const {
    std::vector<float> hidden(rows.gate.begin(), rows.gate.begin() + n);
    hidden.insert(hidden.end(), 2, kUntouched);
    cpu::kernels_of(GetParam())
        .activate[static_cast<int>(a.kind)](a, hidden.data(), rows.up.data(), n);
    EXPECT_EQ(hidden[static_cast<std::size_t>(n)], kUntouched);
    hidden.resize(static_cast<std::size_t>(n));
    return hidden;
  }
};
INSTANTIATE_TEST_SUITE_P(Isas, ActivateKernels, ::testing::ValuesIn(cpu::supported_isas()),
                         [](const auto& info) { return std::string(name_of(info.param)); });

TEST_P(ActivateKernels, AgreeWithTheirFormulas) {
  const Rows rows = random_rows(200, 1);
  for (const Activation& a : activations()) {
    const std::vector<float> got = run(a, rows, 200);
    for (std::size_t i = 0; i < got.size(); ++i) {
      const double want =
          activate_f64(a, static_cast<double>(rows.gate[i]), static_cast<double>(rows.up[i]));
      EXPECT_NEAR(static_cast<double>(got[i]), want, 2e-6 * std::abs(want) + 1e-12)
          << name_of(a.kind) << " g " << rows.gate[i] << " u " << rows.up[i];
    }
  }
}

/// A value does not depend on where in the row it stands, so neither does a token on its batch.
TEST_P(ActivateKernels, TailsGiveTheSameBits) {
  const Rows rows = random_rows(40, 2);
  for (const Activation& a : activations()) {
    const std::vector<float> whole = run(a, rows, 40);
    for (int n = 0; n <= 40; ++n) {
      const std::vector<float> part = run(a, rows, n);
      for (std::size_t i = 0; i < part.size(); ++i) EXPECT_EQ(part[i], whole[i]) << n;
    }
  }
}

TEST_P(ActivateKernels, KeepNaNAndStayFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Activation& a : activations()) {
    const Rows rows{{nan, 1.0F, -1e30F, 1e15F, 90.0F, -90.0F},
                    {1.0F, nan, 1.0F, 1e15F, 2.0F, 2.0F}};
    const std::vector<float> got = run(a, rows, 6);
    EXPECT_EQ(std::isnan(got[0]), a.gated()) << name_of(a.kind);
    EXPECT_TRUE(std::isnan(got[1])) << name_of(a.kind);
    for (std::size_t i = 2; i < got.size(); ++i) {
      EXPECT_TRUE(std::isfinite(got[i])) << name_of(a.kind) << " " << i;
    }
  }
}

TEST_P(ActivateKernels, UngatedOnesIgnoreTheGate) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const Activation& a : activations()) {
    if (a.gated()) continue;
    Rows rows = random_rows(20, 3);
    const std::vector<float> want = run(a, rows, 20);
    rows.gate.assign(rows.gate.size(), nan);
    EXPECT_EQ(run(a, rows, 20), want) << name_of(a.kind);
  }
}

}  // namespace
}  // namespace moesaic::testing
