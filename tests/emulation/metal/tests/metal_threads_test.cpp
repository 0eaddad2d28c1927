// Waits, errors and command buffers of many threads on a device that takes its time. Each test fails
// with a mistake that is easily made: a wait that another thread's wait ends, an error that someone
// else takes or nobody reads, a lock held while the driver waits.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

#include "metal_fixture.hpp"
#include "moesaic/forward.hpp"
#include "ops/call_memory.hpp"

namespace moesaic::testing {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

constexpr std::uint8_t kValue = 0x5A;

#ifdef MOESAIC_REAL_METAL
/// Command buffers that a queue has.
constexpr int kCommandBuffers = 64;
void work_takes(std::chrono::milliseconds) {}
void be_patient_for(std::chrono::milliseconds) {}
#else
constexpr int kCommandBuffers = fake_metal::kMaxOpenBuffers;
/// How long the device takes for a command buffer from now on.
void work_takes(std::chrono::milliseconds time) { fake_metal::pace().takes = time; }
/// After how long a wait for a command buffer is a failure.
void be_patient_for(std::chrono::milliseconds time) { fake_metal::pace().patience = time; }
#endif

class MetalThreads : public MetalTest {
 protected:
  void fill(Context& context, const DeviceArray<std::byte>& array) const {
    backend().fill(
        context,
        {.data = array.data(), .bytes = static_cast<std::int64_t>(array.size()), .value = kValue});
  }
#ifndef MOESAIC_REAL_METAL
  /// Records and submits a fill that the device will fail.
  void fail(Context& context, const DeviceArray<std::byte>& array) const {
    fake_metal::faults().command_error = 3;
    fill(context, array);
    backend().submit(context);
    fake_metal::faults() = {};
  }
#endif
  static void run_threads(int count, const std::function<void(int)>& body) {
    // By one thread: the race checker sees nothing of the library, and so not that one waits for the
    // other where both come first.
    ThreadPool::shared(1);
    std::vector<std::thread> threads;
    for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
    for (std::thread& thread : threads) thread.join();
  }
  static bool filled(const DeviceArray<std::byte>& array) {  // looks without waiting
    return std::ranges::all_of(std::span(array.data(), array.size()),
                               [](std::byte b) { return b == std::byte{kValue}; });
  }
};

TEST_F(MetalThreads, AWaitEndsWithItsOwnWork) {
  work_takes(150ms);
  const auto mine = poisoned<std::byte>(4096);
  std::atomic<int> begun{0};
  // One thread waits for its work while others wait before and beside it, one of them for all.
  run_threads(3, [&](int i) {
    Context own = context();
    if (i == 0) {
      fill(own, mine);
      backend().submit(own);
      ++begun;
      while (begun < 3) std::this_thread::yield();
      std::this_thread::sleep_for(20ms);
      backend().synchronize(own);
      EXPECT_TRUE(filled(mine));
      return;
    }
    while (begun == 0) std::this_thread::yield();
    ++begun;
    if (i == 1) {
      backend().synchronize(own);
    } else {
      const auto word = array(std::vector<int>{1});
      EXPECT_EQ(word.host().front(), 1);
      EXPECT_TRUE(filled(mine)) << "a copy waits for all";
    }
  });
}

#ifndef MOESAIC_REAL_METAL

TEST_F(MetalThreads, AnErrorStaysWithItsContext) {
  const auto a = poisoned<std::byte>(4096), b = poisoned<std::byte>(4096);
  Context failing = context();
  fail(failing, a);
  run_threads(1, [&](int) {
    Context other = context();
    fill(other, b);
    EXPECT_NO_THROW(backend().synchronize(other));
    EXPECT_NO_THROW(b.host()) << "a copy of another thread";
  });
  Context beside = context();
  fill(beside, b);
  EXPECT_NO_THROW(backend().synchronize(beside)) << "another context of this thread";
  EXPECT_THROW(backend().synchronize(failing), DeviceError);
  fill(failing, a);
  EXPECT_NO_THROW(backend().synchronize(failing)) << "thrown once";
  EXPECT_TRUE(filled(a));
}

TEST_F(MetalThreads, GarbageIsNotCopied) {
  const auto a = poisoned<std::byte>(4096);
  Context failing = context();
  fail(failing, a);
  EXPECT_THROW(a.host(), DeviceError) << "the owner copies without a wait";
  {
    Context gone = context();
    fail(gone, a);
    fail(gone, a);
  }
  EXPECT_THROW(a.host(), DeviceError) << "whoever could have been told has gone";
  EXPECT_NO_THROW(a.host());
  run_threads(1, [&](int) {
    Context gone = context();
    fail(gone, a);
  });
  EXPECT_THROW(a.host(), DeviceError) << "its thread has gone too";
}

TEST_F(MetalThreads, AnErrorBehindAnotherIsTheNextCalls) {
  const auto a = poisoned<std::byte>(4096);
  Context context = this->context();
  const auto failing_call = [&] {
    ops::CallMemory memory("test", context);
    memory.take(64);
    fail(context, a);
    throw ShapeError("the one that counts");
  };
  EXPECT_THROW(failing_call(), ShapeError);
  EXPECT_THROW(backend().synchronize(context), DeviceError);
  EXPECT_NO_THROW(backend().synchronize(context));
}

#endif

// More recordings at once than the driver has command buffers: the last thread waits until another
// one submits, which nothing must keep it from.
TEST_F(MetalThreads, ManyRecordAtOnce) {
  constexpr int kThreads = kCommandBuffers + 4;
  be_patient_for(5s);
  std::atomic<int> recorded{0};
  std::atomic<int> right{0};
  std::vector<DeviceArray<std::byte>> arrays;
  for (int i = 0; i < kThreads; ++i) arrays.push_back(poisoned<std::byte>(256));
  run_threads(kThreads, [&](int i) {
    Context own = context();
    const auto& array = arrays[static_cast<std::size_t>(i)];
    fill(own, array);
    ++recorded;
    while (recorded < kCommandBuffers) std::this_thread::yield();
    std::this_thread::sleep_for(100ms);  // until the others wait for a command buffer
    backend().submit(own);
    backend().synchronize(own);
    right += filled(array) ? 1 : 0;
  });
  EXPECT_EQ(right, kThreads);
}

TEST_F(MetalThreads, RecordingsEndWithTheirContext) {
  const auto a = poisoned<std::byte>(256);
  run_threads(3, [&](int) {
    Context own = context();
    fill(own, a);
  });
  auto moved = std::make_unique<Context>(context());
  run_threads(1, [&](int) { fill(*moved, a); });
  run_threads(1, [&](int) { moved.reset(); });
#ifndef MOESAIC_REAL_METAL
  EXPECT_EQ(fake_metal::counters().command_buffers, 0);
#endif
  EXPECT_FALSE(filled(a));
}

TEST_F(MetalThreads, WorkGoesOnBehindItsContext) {
  work_takes(20ms);
  const auto a = poisoned<std::byte>(256);
  {
    Context gone = context();
    fill(gone, a);
    backend().submit(gone);
  }
  EXPECT_EQ(a.host().front(), std::byte{kValue});
}

TEST_F(MetalThreads, ForwardsOfManyThreadsAgree) {
  const Case c{"threads", 5, 64, 96, 4, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack stack = layer.stack(&backend());
  RouterConfig router;
  router.num_experts = c.experts;
  router.top_k = c.top_k;
  LayerRef ref;
  ref.stack = &stack;
  ref.router = &router;
  ref.activation = layer.activation;
  const auto in = array(random_values(c.tokens * c.hidden, 3));
  const auto scores = array(random_values(c.tokens * c.experts, 4));
  constexpr int kThreads = 4;
  std::vector<Floats> first(kThreads);
  run_threads(kThreads, [&](int i) {
    Context own = context();
    const auto bytes = workspace_bytes(own, ref, router.top_k, c.tokens);
    const auto memory = poisoned<std::byte>(static_cast<std::int64_t>(bytes));
    Workspace workspace(memory.data(), bytes);
    const auto y = poisoned<float>(c.tokens * c.hidden);
    for (int call = 0; call < 3; ++call) {
      ForwardIo io;
      io.x = ConstTensorView(in.data(), DType::F32, {c.tokens, c.hidden}, device());
      io.logits = ConstTensorView(scores.data(), DType::F32, {c.tokens, c.experts}, device());
      io.out = TensorView(y.data(), DType::F32, {c.tokens, c.hidden}, device());
      moe_forward(own, ref, io, workspace);
      if (call % 2 == i % 2) backend().synchronize(own);
    }
    first[static_cast<std::size_t>(i)] = y.host();
  });
  for (const Floats& y : first) EXPECT_EQ(y, first.front());
  EXPECT_TRUE(std::ranges::none_of(first.front(), [](float v) { return v != v; }));
}

}  // namespace
}  // namespace moesaic::testing
