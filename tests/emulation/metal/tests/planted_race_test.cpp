// The checker checked, for Metal: a kernel without one of its barriers. Seeds find it by its
// values, ThreadSanitizer by the order of events.
#include <gtest/gtest.h>

#include <numeric>
#include <vector>

#include "seeds.hpp"

// From here on the address spaces are words of the language.
#include "include/metal_stdlib"
#include "launch.hpp"

using namespace metal;

namespace {

// y = x reversed in runs of 128 through one threadgroup array, which is filled again and again.
void reverse_runs(device const float* x, device float* y, int runs, bool both_barriers,
                  uint thread_index) {
  THREADGROUP_ARRAY(float, tile, [128]);
  for (int run = 0; run < runs; run++) {
    tile[thread_index] = x[128 * run + int(thread_index)];
    threadgroup_barrier(mem_flags::mem_threadgroup);
    y[128 * run + int(thread_index)] = tile[127 - thread_index];
    if (both_barriers) threadgroup_barrier(mem_flags::mem_threadgroup);
  }
}

bool reversed_right(bool both_barriers) {
  constexpr int kRuns = 4;
  std::vector<float> x(128 * kRuns), y(128 * kRuns, -1.0f);
  std::iota(x.begin(), x.end(), 0.0f);
  moesaic::emulation::metal_launch({1}, 128, [&](uint3, uint simdgroup, uint lane) {
    reverse_runs(x.data(), y.data(), kRuns, both_barriers, 32 * simdgroup + lane);
  });
  bool right = true;
  for (int i = 0; i < 128 * kRuns; i++) {
    right = right && y[i] == x[i / 128 * 128 + 127 - i % 128];
  }
  return right;
}

TEST(PlantedRace, IsFound) {
  if (moesaic::emulation::race_checked()) {
    EXPECT_EXIT(std::exit(reversed_right(false) ? 0 : 1), testing::ExitedWithCode(66),
                "ThreadSanitizer: data race");
    return;
  }
  int times = 0;
  for (uint64_t seed = 0; seed < 30; seed++) {
    moesaic::emulation::options().seed = seed;
    times += !reversed_right(false);
  }
  EXPECT_GE(times, 10);
  moesaic::emulation::options() = {};
}

TEST(PlantedRace, IsAllThatIsWrong) {
  for (const uint64_t seed : moesaic::emulation::seeds()) {
    moesaic::emulation::options().seed = seed;
    EXPECT_TRUE(reversed_right(true));
  }
  moesaic::emulation::options() = {};
}

}  // namespace
