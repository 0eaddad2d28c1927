// Routing on the device against the host's route_rows.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "launch.h"
#include "moesaic/routing.hpp"
#include "random.hpp"
#include "runtime/emulator.hpp"
#include "seeds.hpp"

namespace moesaic {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kLargest = std::numeric_limits<float>::max();
constexpr std::int32_t kPoison = -77;

struct Result {
  std::vector<std::int32_t> ids;
  std::vector<float> weights;
  std::vector<std::int32_t> nonfinite;
};

Result route_on_device(const RouterConfig& config, const std::vector<float>& logits,
                       std::int64_t row_stride, std::int64_t tokens, std::uint64_t seed) {
  const auto pairs = static_cast<std::size_t>(tokens * config.top_k);
  Result r{std::vector<std::int32_t>(pairs, kPoison), std::vector<float>(pairs, kNan),
           std::vector<std::int32_t>(static_cast<std::size_t>(tokens), kPoison)};
  op::Route args = route_by(config);
  args.logits = logits.data();
  args.row_stride = row_stride;
  args.out = {r.ids.data(), r.weights.data(), tokens, config.top_k};
  args.scratch = r.nonfinite.data();
  emulation::options().seed = seed;
  EXPECT_EQ(cuda::launch_route(args, nullptr), cuda::kOk);
  return r;
}

bool has_nonfinite(const float* row, std::int32_t count) {
  for (std::int32_t e = 0; e < count; ++e) {
    if (!std::isfinite(row[e])) return true;
  }
  return false;
}

void expect_host_result(const RouterConfig& config, const std::vector<float>& logits,
                        std::int64_t row_stride, std::int64_t tokens, const char* what) {
  config.validate();
  Routing host(tokens, config.top_k);
  std::vector<float> scratch(static_cast<std::size_t>(route_scratch_elems(config)));
  op::Route call = route_by(config);
  call.logits = logits.data();
  call.row_stride = row_stride;
  call.out = host.view();
  call.scratch = scratch.data();
  route_rows(call);

  const Result device = route_on_device(config, logits, row_stride, tokens, 0);
  for (std::size_t p = 0; p < device.ids.size(); ++p) {
    ASSERT_EQ(device.ids[p], host.topk_ids()[p])
        << what << ": E " << config.num_experts << ", top_k " << config.top_k << ", pair " << p;
    const float expected = host.topk_weights()[p];
    ASSERT_NEAR(device.weights[p], expected, 1e-6F * std::max(1.0F, std::fabs(expected)))
        << what << ": E " << config.num_experts << ", top_k " << config.top_k << ", pair " << p;
  }
  for (std::int64_t t = 0; t < tokens; ++t) {
    EXPECT_EQ(device.nonfinite[static_cast<std::size_t>(t)],
              has_nonfinite(logits.data() + t * row_stride, config.num_experts) ? 1 : 0);
  }
}

/// Rows of random logits on a coarse grid (many ties), between them rows of every nasty kind.
std::vector<float> nasty_logits(std::int64_t tokens, std::int32_t experts, std::int64_t row_stride,
                                unsigned seed) {
  testing::Random random(seed);
  const auto coarse = [&] { return static_cast<float>(random.below(49) - 24); };
  const auto fine = [&] { return 18.0F * random.uniform() - 9.0F; };
  constexpr float kSpecial[] = {kNan, kInf, -kInf, kLargest, -kLargest, 0.0F, -0.0F, 1e-30F};
  const auto special = [&] { return kSpecial[random.below(std::size(kSpecial))]; };
  std::vector<float> logits(static_cast<std::size_t>(tokens * row_stride), kNan);
  for (std::int64_t t = 0; t < tokens; ++t) {
    float* const row = logits.data() + t * row_stride;
    for (std::int32_t e = 0; e < experts; ++e) {
      switch (t % 9) {
        case 0:
          row[e] = fine();
          break;
        case 1:
          row[e] = 0.25F * coarse();
          break;
        case 2:  // all equal
          row[e] = 1.5F;
          break;
        case 3:  // exponentials underflow: zeros tie
          row[e] = -60.0F * coarse();
          break;
        case 4:
          row[e] = random.below(4) == 0 ? special() : fine();
          break;
        case 5:
          row[e] = special();
          break;
        case 6:
          row[e] = kNan;
          break;
        case 7:
          row[e] = -kInf;
          break;
        default:  // one usable logit
          row[e] = e == experts / 2 ? kInf : (e % 2 == 0 ? kNan : -kInf);
          break;
      }
    }
  }
  return logits;
}

std::vector<float> bias_of(std::int32_t experts, unsigned seed) {
  testing::Random random(seed);
  std::vector<float> bias(static_cast<std::size_t>(experts));
  for (float& b : bias) b = 0.125F * static_cast<float>(random.below(17) - 8);
  return bias;
}

TEST(RouteOnDevice, AnyNumberOfExpertsAndPicks) {
  for (const std::int32_t experts : {1, 2, 31, 32, 33, 60, 128, 129, 256, 257, 512}) {
    for (const std::int32_t top_k : {1, 2, 8, 64, experts}) {
      if (top_k > experts || top_k > cuda::kMaxTopK) continue;
      const std::int64_t row_stride = experts + 3;
      const auto logits = nasty_logits(19, experts, row_stride, static_cast<unsigned>(experts));
      RouterConfig config;
      config.num_experts = experts;
      config.top_k = top_k;
      expect_host_result(config, logits, row_stride, 19, "softmax");
    }
  }
}

TEST(RouteOnDevice, ABlockPerTokenForManyExperts) {
  for (const std::int32_t experts : {513, 1000, 2048, 4095, 4096}) {
    for (const std::int32_t top_k : {1, 8, 64}) {
      const auto logits = nasty_logits(9, experts, experts, static_cast<unsigned>(experts));
      RouterConfig config;
      config.num_experts = experts;
      config.top_k = top_k;
      expect_host_result(config, logits, experts, 9, "softmax");
    }
  }
}

TEST(RouteOnDevice, EveryScoreGuardAndSelection) {
  for (const std::int32_t experts : {7, 64, 640}) {
    const auto logits = nasty_logits(18, experts, experts, 5);
    for (const auto score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                             ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus}) {
      for (const auto guard : {NormGuard::None, NormGuard::AddEps, NormGuard::ClampMin}) {
        for (const int variant : {0, 1, 2, 3}) {
          RouterConfig config;
          config.num_experts = experts;
          config.top_k = 6;
          config.score = score;
          config.guard = guard;
          config.guard_eps = 1e-3F;
          config.renormalize = variant != 1;
          config.select_on = variant == 2 ? SelectOn::Logits : SelectOn::Scores;
          config.scale = variant == 3 ? 2.5F : 1.0F;
          if (variant >= 1) config.router_bias = bias_of(experts, 1);
          if (variant >= 2) config.selection_bias = bias_of(experts, 2);
          expect_host_result(config, logits, experts, 18, "scores");
        }
      }
    }
  }
}

TEST(RouteOnDevice, Groups) {
  struct Case {
    std::int32_t experts, groups, used, top_k;
  };
  for (const Case& c : {Case{8, 4, 2, 3}, Case{256, 8, 4, 8}, Case{160, 8, 3, 6},
                        Case{96, 96, 40, 8}, Case{1024, 32, 4, 64}, Case{600, 5, 1, 10}}) {
    const auto logits = nasty_logits(9, c.experts, c.experts, 11);
    for (const auto reduce : {GroupReduce::Top2Sum, GroupReduce::Max}) {
      for (const auto mask : {GroupMask::MinusInfinity, GroupMask::Zero}) {
        RouterConfig config;
        config.num_experts = c.experts;
        config.top_k = c.top_k;
        config.num_groups = c.groups;
        config.groups_used = c.used;
        config.group_reduce = reduce;
        config.group_mask = mask;
        config.score = ScoreFunction::Sigmoid;
        config.selection_bias = bias_of(c.experts, 3);
        expect_host_result(config, logits, c.experts, 9, "groups");
      }
    }
  }
}

TEST(RouteOnDevice, GivenIdsAreWeighed) {
  for (const std::int32_t experts : {12, 600}) {
    const auto logits = nasty_logits(18, experts, experts, 29);
    for (const auto score : {ScoreFunction::Softmax, ScoreFunction::SoftmaxSelected,
                             ScoreFunction::Sigmoid, ScoreFunction::SqrtSoftplus}) {
      RouterConfig config;
      config.num_experts = experts;
      config.top_k = 4;
      config.score = score;
      config.select_on = SelectOn::Given;
      config.scale = 1.5F;
      Routing host(18, config.top_k);
      for (std::size_t p = 0; p < host.topk_ids().size(); ++p) {
        host.topk_ids()[p] = static_cast<std::int32_t>(p * 7) % (experts + 1) - 1;
      }
      for (std::size_t slot = 0; slot < 4; ++slot) host.topk_ids()[slot] = -1;  // none at all
      Result device{{host.topk_ids().begin(), host.topk_ids().end()},
                    std::vector<float>(host.topk_ids().size(), kNan),
                    {}};
      std::vector<float> scratch(static_cast<std::size_t>(route_scratch_elems(config)));
      op::Route args = route_by(config);
      args.logits = logits.data();
      args.row_stride = experts;
      args.out = host.view();
      args.scratch = scratch.data();
      route_rows(args);
      args.out = {device.ids.data(), device.weights.data(), 18, config.top_k};
      args.scratch = nullptr;
      emulation::options().seed = 1;
      ASSERT_EQ(cuda::launch_route(args, nullptr), cuda::kOk);
      for (std::size_t p = 0; p < device.ids.size(); ++p) {
        ASSERT_EQ(device.ids[p], host.topk_ids()[p]);
        ASSERT_NEAR(device.weights[p], host.topk_weights()[p], 1e-6F) << "pair " << p;
      }
    }
  }
}

TEST(RouteOnDevice, SchedulesDoNotShow) {
  for (const std::int32_t experts : {48, 700}) {
    const auto logits = nasty_logits(9, experts, experts, 23);
    RouterConfig config;
    config.num_experts = experts;
    config.top_k = 5;
    config.num_groups = 4;
    config.groups_used = 2;
    const Result first = route_on_device(config, logits, experts, 9, 0);
    for (const std::uint64_t seed : emulation::seeds()) {
      const Result other = route_on_device(config, logits, experts, 9, seed);
      EXPECT_EQ(other.ids, first.ids);
      for (std::size_t p = 0; p < first.weights.size(); ++p) {
        ASSERT_EQ(other.weights[p], first.weights[p]);
      }
    }
  }
}

TEST(RouteOnDevice, NoTokensAndLimits) {
  RouterConfig config;
  config.num_experts = 8;
  config.top_k = 2;
  EXPECT_TRUE(route_on_device(config, {}, 8, 0, 0).ids.empty());
  op::Route args = route_by(config);
  args.out.num_tokens = 1;
  args.num_experts = cuda::kMaxExperts + 1;
  EXPECT_EQ(cuda::launch_route(args, nullptr), cuda::kUnsupported);
  args.num_experts = 4096;
  args.top_k = cuda::kMaxTopK + 1;
  EXPECT_EQ(cuda::launch_route(args, nullptr), cuda::kUnsupported);
}

TEST(SharedRouting, SigmoidOrOne) {
  std::vector<float> logits(300);
  for (std::size_t t = 0; t < logits.size(); ++t) logits[t] = 0.1F * static_cast<float>(t) - 12.0F;
  for (const bool gated : {true, false}) {
    std::vector<std::int32_t> ids(300, kPoison);
    std::vector<float> weights(300, kNan);
    EXPECT_EQ(cuda::launch_shared_routing({.logits = gated ? logits.data() : nullptr,
                                           .out = {ids.data(), weights.data(), 300, 1}},
                                          nullptr),
              cuda::kOk);
    for (std::size_t t = 0; t < 300; ++t) {
      EXPECT_EQ(ids[t], 0);
      EXPECT_NEAR(weights[t], gated ? 1.0F / (1.0F + std::exp(-logits[t])) : 1.0F, 1e-6F);
    }
  }
}

}  // namespace
}  // namespace moesaic
