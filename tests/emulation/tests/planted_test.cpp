// The checker checked: seeds find the planted mistakes whose values show, and nothing in the
// kernels without them. Those that only the order of events shows are found by ThreadSanitizer:
// planted_race.
#include "planted.hpp"

#include <gtest/gtest.h>

#include "seeds.hpp"

namespace moesaic::planted {
namespace {

class Planted : public testing::TestWithParam<Plant> {
 protected:
  void TearDown() override { emulation::options() = {}; }

  static bool found(bool (*is_right)(), uint64_t seed) {
    emulation::options().seed = seed;
    try {
      return !is_right();
    } catch (const emulation::Fault&) {
      return true;
    }
  }
};
INSTANTIATE_TEST_SUITE_P(Mistakes, Planted, testing::ValuesIn(kPlants),
                         [](const auto& plant) { return std::string(plant.param.name); });

constexpr uint64_t kSeeds = 30;

TEST_P(Planted, IsFoundBySeeds) {
  if (emulation::race_checked()) GTEST_SKIP() << "planted_race shows what ThreadSanitizer finds";
  if (!GetParam().shows_in_values) GTEST_SKIP() << "found by ThreadSanitizer: planted_race";
  uint64_t times = 0;
  for (uint64_t seed = 0; seed < kSeeds; seed++) times += found(GetParam().is_right, seed);
  EXPECT_GE(times, kSeeds / 3);
}

TEST_P(Planted, IsAllThatIsWrong) {
  for (uint64_t seed = 0; seed < kSeeds; seed++) {
    EXPECT_FALSE(found(GetParam().is_right_without, seed)) << "seed " << seed;
  }
}

}  // namespace
}  // namespace moesaic::planted
