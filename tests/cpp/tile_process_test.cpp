// What AMX means to a process: forked children, threads that end, signal handlers that use tiles of
// their own, and that no call leaves tile state behind. Runs where the processor has AMX.

#include <gtest/gtest.h>

#ifdef MOESAIC_HAVE_AMX

#include <sys/auxv.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdint>
#include <thread>
#include <vector>

#include "cpu/cpu_backend.hpp"
#include "cpu/isa.hpp"
#include "cpu/kernels/amx/tiles.hpp"
#include "layers.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

class TileProcess : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!cpu::supported(CpuIsa::Amx)) GTEST_SKIP() << "this processor or system has no AMX";
  }

  /// A product of enough rows for tiles.
  Floats product(int threads) const {
    Context context = cpu_context(CpuIsa::Amx, threads);
    return run_case(context, ProductCase{.weights = &role_.weights,
                                         .x = dense_rows(x_, 512),
                                         .experts = std::vector<std::int32_t>(64, 0),
                                         .precision = Precision::Fast});
  }

 private:
  TestRole role_ = make_role(1, 96, 512, QuantType::Q4_K, 1, false);
  Floats x_ = random_values(64 * 512, 2);
};

/// The state components in use by this thread, as xgetbv tells; bit 18 is that of tiles.
bool tiles_in_use() {
  std::uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(1));
  return (low >> 18 & 1U) != 0;
}

TEST_F(TileProcess, ACallLeavesNoTileState) {
  cpu::Tiles::configure([] {
    cpu::TileConfig config;
    config.shape(0, 16, 64);
    return config;
  }());
  cpu::Tiles::zero<0>();
  const std::vector<std::uint8_t> ones(1024, 1);
  cpu::Tiles::load<0>(ones.data(), 64);
  EXPECT_TRUE(tiles_in_use()) << "the question below has an answer";
  cpu::Tiles::release();
  product(1);
  EXPECT_FALSE(tiles_in_use());
}

TEST_F(TileProcess, AForkedChildComputesTheSame) {
  const Floats want = product(2);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) _exit(same_bits(product(2), want) ? 0 : 1);
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST_F(TileProcess, ThreadsThatEndTakeNothingWithThem) {
  const Floats want = product(1);
  std::atomic<int> right{0};
  for (int round = 0; round < 4; ++round) {
    std::vector<std::thread> threads;
    for (int i = 0; i < 4; ++i) {
      threads.emplace_back([&] { right += same_bits(product(1), want) ? 1 : 0; });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(right, 16);
}

std::atomic<int> handled{0};
void use_tiles(int) {
  cpu::TileConfig config;
  for (int tile = 0; tile < cpu::kTileCount; ++tile) config.shape(tile, 3, 12);
  cpu::Tiles::configure(config);
  cpu::Tiles::release();
  handled.fetch_add(1, std::memory_order_relaxed);
}

TEST_F(TileProcess, HandlersThatUseTilesDoNotDisturb) {
  const Floats want = product(1);
  // Tiles are part of what a handler's stack must hold.
  std::vector<std::byte> memory(getauxval(AT_MINSIGSTKSZ) + 65536);
  stack_t stack = {}, before = {};
  stack.ss_sp = memory.data();
  stack.ss_size = memory.size();
  ASSERT_EQ(sigaltstack(&stack, &before), 0);
  struct sigaction action = {}, old = {};
  action.sa_handler = use_tiles;
  action.sa_flags = SA_ONSTACK | SA_RESTART;
  ASSERT_EQ(sigaction(SIGALRM, &action, &old), 0);
  const itimerval often{{0, 50}, {0, 50}}, never{};
  handled = 0;
  setitimer(ITIMER_REAL, &often, nullptr);
  int wrong = 0;
  for (int i = 0; i < 2000 && handled < 100; ++i) wrong += same_bits(product(1), want) ? 0 : 1;
  setitimer(ITIMER_REAL, &never, nullptr);
  sigaction(SIGALRM, &old, nullptr);
  sigaltstack(&before, nullptr);
  EXPECT_EQ(wrong, 0);
  EXPECT_GE(handled.load(), 100);
}

}  // namespace
}  // namespace moesaic::testing

#else

TEST(TileProcess, DISABLED_ThisBuildHasNoAmx) {}

#endif
