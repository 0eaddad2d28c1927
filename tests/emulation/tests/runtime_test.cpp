// What the emulator refuses, and that it goes on working afterwards.
#include <gtest/gtest.h>

#include <array>
#include <numeric>
#include <string>
#include <vector>

#include "device.cuh"
#include "seeds.hpp"

namespace moesaic {
namespace {

class Emulator : public testing::Test {
 protected:
  void TearDown() override { emulation::options() = {}; }
};

// The words of the fault that a launch of `body` ends with; empty when it ends well.
template <class Body>
std::string fault_of(dim3 grid, dim3 block, Body body, std::size_t dynamic_shared = 0) {
  try {
    emulation::launch(grid, block, dynamic_shared, body);
  } catch (const emulation::Fault& fault) {
    return fault.what();
  }
  return "";
}

testing::AssertionResult says(const std::string& text, const std::string& words) {
  if (text.find(words) != std::string::npos) return testing::AssertionSuccess();
  return testing::AssertionFailure() << "\"" << text << "\" does not say \"" << words << "\"";
}

TEST_F(Emulator, EveryThreadRunsOnceUnderEverySeed) {
  const dim3 grid(3, 2, 2), block(5, 3, 4);
  for (const uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    std::vector<int> runs(grid.count() * block.count());
    emulation::launch(grid, block, 0, [&] {
      const std::size_t b = blockIdx.x + grid.x * (blockIdx.y + grid.y * blockIdx.z);
      const std::size_t t = threadIdx.x + block.x * (threadIdx.y + block.y * threadIdx.z);
      runs[b * block.count() + t]++;
    });
    EXPECT_EQ(runs, std::vector<int>(runs.size(), 1));
  }
}

TEST_F(Emulator, SeedsGiveDifferentOrdersAndEachSeedTheSameOne) {
  auto order = [](uint64_t seed) {
    emulation::options().seed = seed;
    std::vector<unsigned> seen;
    emulation::launch(dim3(4), dim3(64), 0, [&] { seen.push_back(blockIdx.x * 64 + threadIdx.x); });
    return seen;
  };
  if (emulation::race_checked()) GTEST_SKIP() << "the order is recorded without ordering";
  std::vector<unsigned> in_order(256);
  std::iota(in_order.begin(), in_order.end(), 0u);
  EXPECT_EQ(order(0), in_order);
  EXPECT_NE(order(1), in_order);
  EXPECT_NE(order(1), order(2));
  EXPECT_EQ(order(1), order(1));
}

TEST_F(Emulator, BarriersAtDifferentLinesAreAFault) {
  const std::string fault = fault_of(dim3(1), dim3(64), [] {
    if (threadIdx.x < 32) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  });
  EXPECT_TRUE(says(fault, "meet in different barriers"));
  EXPECT_TRUE(says(fault, "runtime_test.cpp"));
}

TEST_F(Emulator, ABarrierThatSomeSkipWaitsForThoseStillRunningOnly) {
  EXPECT_EQ(fault_of(dim3(1), dim3(64),
                     [] {
                       if (threadIdx.x < 32) return;
                       __syncthreads();
                     }),
            "");
}

TEST_F(Emulator, DeadlocksNameWhoWaitsWhere) {
  const std::string fault = fault_of(dim3(1), dim3(64), [] {
    if (threadIdx.x == 40) __syncwarp();
    __syncthreads();
  });
  EXPECT_TRUE(says(fault, "deadlock"));
  EXPECT_TRUE(says(fault, "__syncthreads at"));
}

TEST_F(Emulator, WaitingForABarrierThatNeverCompletesIsALivelock) {
  const std::string fault = fault_of(dim3(1), dim3(32), [] {
    MOESAIC_SHARED(uint64_t, barrier, [1]);
    if (threadIdx.x == 0) dev::mbarrier_init(barrier, 33);
    __syncthreads();
    dev::mbarrier_arrive(barrier);
    dev::mbarrier_wait(barrier, 0);
  });
  EXPECT_TRUE(says(fault, "livelock"));
  EXPECT_TRUE(says(fault, "mbarrier_wait"));
}

TEST_F(Emulator, LanesMeetInOneOperationWithOneMask) {
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(32),
                            [] {
                              if (threadIdx.x < 16) {
                                __shfl_xor_sync(0xFFFFFFFFu, 1, 1);
                              } else {
                                __ballot_sync(0xFFFFFFFFu, 1);
                              }
                            }),
                   "different operations"));
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(32),
                            [] { __ballot_sync(threadIdx.x < 16 ? 0xFFFFFFFFu : 0xFFFF0000u, 1); }),
                   "different masks"));
  EXPECT_TRUE(
      says(fault_of(dim3(1), dim3(32), [] { __syncwarp(0x0000FFFFu); }), "not in its own mask"));
  EXPECT_EQ(
      fault_of(dim3(1), dim3(32), [] { __syncwarp(threadIdx.x < 16 ? 0x0000FFFFu : 0xFFFF0000u); }),
      "");
}

TEST_F(Emulator, SharedMemoryStartsPoisonedInEveryBlock) {
  for (const uint64_t seed : emulation::seeds()) {
    emulation::options().seed = seed;
    std::array<int, 4> poisoned{};
    emulation::launch(dim3(4), dim3(1), 64, [&] {
      MOESAIC_SHARED(uint32_t, fixed, [16]);
      MOESAIC_DYN_SHARED(uint32_t, dynamic);
      for (int i = 0; i < 16; i++) {
        poisoned[blockIdx.x] += fixed[i] == 0xFFFFFFFFu && dynamic[i] == 0xFFFFFFFFu;
        fixed[i] = dynamic[i] = 7;
      }
    });
    EXPECT_EQ(poisoned, (std::array<int, 4>{16, 16, 16, 16}));
  }
}

TEST_F(Emulator, SharedMemoryHasALimit) {
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(1), [] {}, 228 * 1024), "at most 232448"));
  EXPECT_EQ(fault_of(dim3(1), dim3(1), [] {}, 227 * 1024), "");
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(1),
                            [] {
                              MOESAIC_SHARED(char, big, [49 * 1024]);
                              (void)big;
                            }),
                   "over its limit"));
}

TEST_F(Emulator, LeavingWithCopiesInFlightIsAFault) {
  alignas(16) static const uint32_t source[4] = {1, 2, 3, 4};
  const std::string fault = fault_of(dim3(1), dim3(1), [] {
    MOESAIC_SHARED(uint32_t, tile, [4]);
    dev::cp_async16(tile, source);
    dev::cp_async_commit();
  });
  EXPECT_TRUE(says(fault, "copies in flight"));
  EXPECT_TRUE(says(fault, "cp_async16"));
}

TEST_F(Emulator, EveryThreadOfADependentGridWaits) {
  const auto some = +[](int first) {
    if (static_cast<int>(threadIdx.x) >= first) dev::griddepcontrol_wait();
  };
  const auto launched = [&](int first) {
    return dev::launch_dependent(some, dim3(2), dim3(64), 0, nullptr, first);
  };
  EXPECT_EQ(launched(0), 0);
  try {
    launched(1);
    FAIL() << "a thread did not wait";
  } catch (const emulation::Fault& fault) {
    EXPECT_TRUE(says(fault.what(), "without griddepcontrol_wait"));
  }
}

TEST_F(Emulator, CopiesAndLoadsAreAligned) {
  alignas(16) static const uint32_t source[8] = {};
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(1),
                            [] {
                              MOESAIC_SHARED(uint32_t, tile, [8]);
                              dev::cp_async16(tile + 1, source);
                            }),
                   "16 aligned bytes of shared"));
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(1),
                            [] {
                              MOESAIC_SHARED(uint32_t, tile, [8]);
                              dev::cp_async16(tile, source + 1);
                            }),
                   "16 aligned bytes of global"));
  EXPECT_TRUE(
      says(fault_of(dim3(1), dim3(1), [] { dev::load_weight16(source + 1); }), "misaligned"));
}

TEST_F(Emulator, ABarrierObjectMustBeInitialised) {
  EXPECT_TRUE(says(fault_of(dim3(1), dim3(1),
                            [] {
                              MOESAIC_SHARED(uint64_t, barrier, [1]);
                              dev::mbarrier_arrive(barrier);
                            }),
                   "not initialised"));
}

TEST_F(Emulator, BlocksMayWaitForEachOtherWhenAllAreResident) {
  emulation::options().resident_blocks = 4;
  unsigned arrived = 0;
  const std::string fault = fault_of(dim3(4), dim3(32), [&] {
    if (threadIdx.x == 0) {
      atomicAdd(&arrived, 1u);
      while (atomicAdd(&arrived, 0u) < gridDim.x) __nanosleep(20);
    }
    __syncthreads();
  });
  EXPECT_EQ(fault, "");
  EXPECT_EQ(arrived, 4u);
}

TEST_F(Emulator, CountsWhatIsReadOfWeights) {
  alignas(16) static const uint32_t source[64] = {};
  emulation::counters() = {};
  emulation::launch(dim3(2), dim3(8), 0, [] {
    MOESAIC_SHARED(uint32_t, tile, [32]);
    dev::load_weight16(source);
    dev::load_weight(reinterpret_cast<const uint8_t*>(source));
    dev::cp_async_weight16(&tile[4 * threadIdx.x], source);
    dev::cp_async16(&tile[4 * threadIdx.x], source);
    dev::cp_async_commit();
    dev::cp_async_wait<0>();
  });
  EXPECT_EQ(emulation::counters().weight_bytes, 16u * (16 + 1 + 16));
  EXPECT_EQ(emulation::counters().threads, 16u);
}

TEST_F(Emulator, WorksAfterAFault) {
  for (int i = 0; i < 3; i++) {
    EXPECT_NE(fault_of(dim3(2), dim3(96), [] { __trap(); }), "");
    int sum = 0;
    EXPECT_EQ(fault_of(dim3(2), dim3(96), [&] { atomicAdd(&sum, 1); }), "");
    EXPECT_EQ(sum, 192);
  }
}

}  // namespace
}  // namespace moesaic
