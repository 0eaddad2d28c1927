// Pools on the threads of an OpenMP runtime: GCC's, which every machine with its compiler has.

#include <dlfcn.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cfenv>
#include <set>
#include <thread>
#include <vector>

#include "base/float_state.hpp"
#include "base/openmp.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic {
namespace {

constexpr const char* kLibrary = "libgomp.so.1";
constexpr int kThreads = 4;

class OpenMpThreads : public ::testing::Test {
 protected:
  void SetUp() override {
    void* const library = ::dlopen(kLibrary, RTLD_NOW);
    if (library == nullptr) GTEST_SKIP() << ::dlerror();
    ASSERT_TRUE(ThreadPool::borrow_openmp(kLibrary));
    set_threads_ = reinterpret_cast<void (*)(int)>(::dlsym(library, "omp_set_num_threads"));
    ASSERT_NE(set_threads_, nullptr);
    set_threads_(kThreads);
  }

  /// Makes chunks wait for each other, so that no thread can take two of them.
  static std::vector<std::thread::id> threads_of(ThreadPool& pool) {
    std::vector<std::thread::id> ids(static_cast<std::size_t>(pool.threads()));
    std::atomic<int> inside{0};
    pool.parallel_for(pool.threads(), [&](std::int64_t, int thread) {
      ids[static_cast<std::size_t>(thread)] = std::this_thread::get_id();
      ++inside;
      while (inside.load() < pool.threads()) std::this_thread::yield();
    });
    return ids;
  }

  /// Those of the runtime itself.
  static std::vector<std::thread::id> threads_of_runtime() {
    std::vector<std::thread::id> ids(kThreads);
    const auto member = [](void* data) {
      auto& all = *static_cast<std::vector<std::thread::id>*>(data);
      all[static_cast<std::size_t>(openmp_lender()->thread_num())] = std::this_thread::get_id();
    };
    openmp_lender()->parallel(member, &ids, kThreads, 0);
    return ids;
  }

  void (*set_threads_)(int) = nullptr;
};

TEST_F(OpenMpThreads, ArePoolsThreads) {
  ThreadPool pool(kThreads);
  EXPECT_EQ(threads_of(pool), threads_of_runtime());
}

TEST_F(OpenMpThreads, OfAnotherNumberAreLeftAlone) {
  ThreadPool pool(kThreads - 1);
  const std::vector<std::thread::id> runtime = threads_of_runtime();
  const std::vector<std::thread::id> own = threads_of(pool);
  EXPECT_EQ(own.front(), runtime.front());
  const std::set<std::thread::id> theirs(runtime.begin() + 1, runtime.end());
  for (std::size_t i = 1; i < own.size(); ++i) EXPECT_FALSE(theirs.contains(own[i]));
}

TEST_F(OpenMpThreads, RunEveryChunkOnce) {
  ThreadPool pool(kThreads);
  for (const std::int64_t chunks : {0, 1, 2, 3, 4, 5, 64, 10'000}) {
    std::vector<std::atomic<int>> seen(static_cast<std::size_t>(chunks));
    std::atomic<bool> in_range{true};
    pool.parallel_for(chunks, [&](std::int64_t chunk, int thread) {
      ++seen[static_cast<std::size_t>(chunk)];
      if (thread < 0 || thread >= kThreads) in_range = false;
    });
    for (const auto& count : seen) ASSERT_EQ(count.load(), 1);
    EXPECT_TRUE(in_range.load());
  }
}

TEST_F(OpenMpThreads, AreNeverBesideOnesOfThePool) {
  // A pool's own threads are awake for a while after they start, and after calls of another number.
  for (int i = 0; i < 200; ++i) {
    ThreadPool pool(kThreads);
    std::vector<std::atomic<int>> inside(kThreads);
    std::atomic<bool> alone{true};
    for (int call = 0; call < 5; ++call) {
      set_threads_(call % 2 == 0 ? kThreads : 1);
      pool.parallel_for(40, [&](std::int64_t, int thread) {
        auto& count = inside[static_cast<std::size_t>(thread)];
        if (count.fetch_add(1) != 0) alone = false;
        for (int spin = 0; spin < 100; ++spin) count.load();
        count.fetch_sub(1);
      });
    }
    ASSERT_TRUE(alone.load());
  }
}

TEST_F(OpenMpThreads, NestedCallsRunInline) {
  ThreadPool pool(kThreads);
  std::atomic<int> inner{0};
  std::atomic<bool> same{true};
  pool.parallel_for(8, [&](std::int64_t, int outer) {
    pool.parallel_for(5, [&](std::int64_t, int thread) {
      ++inner;
      if (thread != outer) same = false;
    });
  });
  EXPECT_EQ(inner.load(), 40);
  EXPECT_TRUE(same.load());
}

TEST_F(OpenMpThreads, ServeACallFromInsideTheRuntime) {
  ThreadPool pool(kThreads);
  struct Sums {
    ThreadPool* pool;
    std::array<std::atomic<int>, kThreads> of;
  } sums{&pool, {}};
  const auto member = [](void* data) {
    auto& all = *static_cast<Sums*>(data);
    auto& sum = all.of[static_cast<std::size_t>(openmp_lender()->thread_num())];
    all.pool->parallel_for(100, [&](std::int64_t, int) { ++sum; });
  };
  openmp_lender()->parallel(member, &sums, kThreads, 0);
  for (const auto& sum : sums.of) EXPECT_EQ(sum.load(), 100);
}

TEST_F(OpenMpThreads, ServeSeveralCallersAtOnce) {
  ThreadPool pool(kThreads);
  std::atomic<int> ran{0};
  std::vector<std::thread> callers;
  for (int i = 0; i < 3; ++i) {
    callers.emplace_back([&] {
      set_threads_(kThreads);
      for (int call = 0; call < 50; ++call) {
        pool.parallel_for(16, [&](std::int64_t, int) { ++ran; });
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(ran.load(), 3 * 50 * 16);
}

TEST_F(OpenMpThreads, RoundAsTheCallerAndThenAsBefore) {
  ThreadPool pool(kThreads);
  threads_of_runtime();  // starts them, as they begin with the rounding mode of who does
  const FloatState nearest = float_state();
  ASSERT_EQ(std::fesetround(FE_UPWARD), 0);
  const FloatState upward = float_state();
  std::atomic<int> same{0};
  pool.parallel_for(64, [&](std::int64_t, int) { same += float_state() == upward; });
  std::fesetround(FE_TONEAREST);
  EXPECT_NE(upward, nearest);
  EXPECT_EQ(same.load(), 64);
  std::array<FloatState, kThreads> after{};
  const auto member = [](void* data) {
    auto& all = *static_cast<std::array<FloatState, kThreads>*>(data);
    all[static_cast<std::size_t>(openmp_lender()->thread_num())] = float_state();
  };
  openmp_lender()->parallel(member, &after, kThreads, 0);
  for (const FloatState state : after) EXPECT_EQ(state, nearest);
}

TEST_F(OpenMpThreads, AreNotWaitedForInAForkedChild) {
  ThreadPool pool(kThreads);
  threads_of(pool);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::atomic<int> ran{0};
    pool.parallel_for(100, [&](std::int64_t, int) { ++ran; });
    _exit(openmp_lender() == nullptr && ran.load() == 100 ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
}

TEST(OpenMpLibrary, ThatIsNotLoadedLendsNothing) {
  EXPECT_FALSE(ThreadPool::borrow_openmp("libmoesaic_nothing.so"));
  EXPECT_FALSE(ThreadPool::borrow_openmp("libc.so.6"));
}

}  // namespace
}  // namespace moesaic
