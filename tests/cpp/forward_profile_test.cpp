// What a forward says about itself: the path it takes, its explanation, the zones it opens.

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <string>

#include "forward_problem.hpp"

namespace moesaic::testing {
namespace {

TEST(Forward, ZonesAddUpToWallTime) {
  Case c = case_named("wide_batch");
  c.hidden = c.intermediate = 512;
  // On the CPU backend only: the fake one's own time would dwarf the steps between the zones.
  const Backend& backend = backend_for(Device{});
  const FullLayer full(c, &backend, true);
  const Floats values = random_values(c.tokens * c.hidden, 3);
  const LayerCase call{.layer = full.ref(), .x = rows_of(values, c.hidden)};
  for (const Way& way : kWays) {
    Tuning tuning;
    tuning.gemm = way.gemm;
    tuning.row_space = way.row_space;
    Context context(backend, tuning, ThreadPool::shared(1));
    Workspace workspace(workspace_bytes(context, call.layer, c.top_k, c.tokens));
    Tensor y(DType::F32, c.tokens, c.hidden);
    const ForwardIo io = call.io(y.view());
    moe_forward(context, call.layer, io, workspace);
    double best = 0.0;  // the share of the wall time inside zones; 1 is all of it
    for (int repeat = 0; repeat < 5 && best < 0.9; ++repeat) {
      Profiler profiler;
      context.attach(&profiler);
      const auto start = std::chrono::steady_clock::now();
      moe_forward(context, call.layer, io, workspace);
      const std::chrono::duration<double, std::nano> wall =
          std::chrono::steady_clock::now() - start;
      double sum = 0.0;
      for (std::size_t z = 0; z < static_cast<std::size_t>(Zone::Count); ++z) {
        sum += static_cast<double>(profiler.zone(static_cast<Zone>(z)).nanoseconds);
      }
      EXPECT_LE(sum, wall.count()) << way.name << ": a zone was counted twice";
      best = std::max(best, sum / wall.count());
      for (const Zone z : {Zone::Router, Zone::Route, Zone::Plan, Zone::Shared}) {
        EXPECT_EQ(profiler.zone(z).calls, 1) << way.name << " " << name_of(z);
      }
      EXPECT_EQ(profiler.zone(Zone::Gather).calls, way.row_space == RowSpaceMode::PackedRows);
      EXPECT_EQ(profiler.zone(Zone::Align).calls, way.gemm == GemmMode::Aligned);
      EXPECT_EQ(profiler.zone(Zone::GateUp).calls, 1) << way.name;
      EXPECT_EQ(profiler.zone(Zone::Activate).calls, 0) << way.name << ": part of gate_up";
      EXPECT_EQ(profiler.zone(Zone::Down).calls, 1) << way.name;
      EXPECT_EQ(profiler.counter(Counter::Calls), 1);
      EXPECT_EQ(profiler.counter(Counter::Tokens), c.tokens);
      EXPECT_EQ(profiler.counter(Counter::Pairs), c.tokens * c.top_k);
      EXPECT_GT(profiler.counter(Counter::ExpertsTouched), 0);
      if (way.gemm == GemmMode::Aligned) {
        EXPECT_GT(profiler.counter(Counter::PaddedRows), 0);
      }
      context.attach(nullptr);
    }
    EXPECT_GE(best, 0.9) << backend.info().name << " " << way.name;
  }
}

TEST(Forward, DefaultPhasesOpenTheirZones) {
  const Case c = case_named("odd_sizes");
  const FakeBackend backend;
  const FullLayer full(c, &backend, true);
  const Floats values = random_values(c.tokens * c.hidden, 3);
  for (const Way& way : kWays) {
    Context context = poisoned_context(backend, Precision::Auto, 1);
    Profiler profiler;
    context.attach(&profiler);
    run_case(context, {.layer = full.ref(), .x = rows_of(values, c.hidden)}, way);
    for (const Zone z : {Zone::GateUp, Zone::Activate, Zone::Down, Zone::Combine, Zone::Shared}) {
      EXPECT_EQ(profiler.zone(z).calls, 1) << way.name << " " << name_of(z);
    }
  }
}

TEST(ChoosePath, IsAPureFunctionOfSizesAndTuning) {
  Tuning tuning;
  EXPECT_EQ(choose_path(1, 8, 32, tuning).path, Path::Gemv);
  EXPECT_EQ(choose_path(2, 16, 32, tuning).path, Path::Bucketed);
  EXPECT_EQ(choose_path(2, 16, 32, tuning).row_space, RowSpace::TokenPairs);
  EXPECT_EQ(choose_path(8, 64, 32, tuning).precision, Precision::Exact);  // 64 = 2 * 32 pairs
  EXPECT_EQ(choose_path(9, 72, 32, tuning).precision, Precision::Fast);
  tuning.batch_invariant = true;
  EXPECT_EQ(choose_path(512, 4096, 32, tuning).precision, Precision::Exact);
  tuning.precision = Precision::Fast;
  EXPECT_EQ(choose_path(1, 8, 32, tuning).precision, Precision::Fast);
  tuning.gemm = GemmMode::Aligned;
  tuning.row_space = RowSpaceMode::PackedRows;
  EXPECT_EQ(choose_path(512, 4096, 32, tuning).path, Path::Aligned);
  EXPECT_EQ(choose_path(1, 8, 32, tuning).path, Path::Aligned);
  EXPECT_EQ(choose_path(512, 4096, 32, tuning).row_space, RowSpace::PackedRows);
  EXPECT_FALSE(choose_path(512, 4096, 32, tuning).reason.empty());
}

TEST(Explain, NamesPathKernelsAndSizes) {
  const Case c = case_named("wide_batch");
  const Backend& backend = backend_for(Device{});
  const FullLayer full(c, &backend, true);
  Context context(backend, Tuning{}, ThreadPool::shared(1));
  const Explanation explanation = explain(context, full.ref(), c.top_k, 1);
  const auto fact = [&](const std::string& name) -> std::string {
    for (const auto& [key, value] : explanation.facts) {
      if (key == name) return value;
    }
    return "absent";
  };
  EXPECT_EQ(fact("path"), "gemv");
  EXPECT_EQ(fact("precision"), "exact");
  EXPECT_EQ(fact("gate type"), "Q4_K");
  EXPECT_EQ(fact("down type"), "Q6_K");
  EXPECT_EQ(fact("down kernel"), backend.kernel_name(full.stack.down().ref, context.tuning()));
  EXPECT_EQ(fact("workspace bytes"),
            std::to_string(workspace_bytes(context, full.ref(), c.top_k, 1)));
  EXPECT_EQ(fact("experts touched (uniform routing)"), "4 of 16");
}

}  // namespace
}  // namespace moesaic::testing
