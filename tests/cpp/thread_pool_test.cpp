#include "moesaic/thread_pool.hpp"

#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "base/cpu_quota.hpp"
#include "moesaic/error.hpp"

#if defined(__SANITIZE_THREAD__)
#define MOESAIC_TEST_TSAN 1
#elif defined(__has_feature)
#if __has_feature(thread_sanitizer)
#define MOESAIC_TEST_TSAN 1
#endif
#if __has_feature(address_sanitizer)
#define MOESAIC_TEST_ASAN 1
#endif
#endif
#ifdef __SANITIZE_ADDRESS__
#define MOESAIC_TEST_ASAN 1
#endif

namespace moesaic {
namespace {

using namespace std::chrono_literals;
using Clock = std::chrono::steady_clock;

/// Every chunk once, thread indices in range.
void expect_complete(ThreadPool& pool, std::int64_t chunks) {
  std::vector<std::atomic<int>> seen(static_cast<std::size_t>(chunks));
  std::atomic<bool> in_range{true};
  pool.parallel_for(chunks, [&](std::int64_t chunk, int thread) {
    seen[static_cast<std::size_t>(chunk)].fetch_add(1, std::memory_order_relaxed);
    if (thread < 0 || thread >= pool.threads()) in_range = false;
  });
  for (const auto& count : seen) ASSERT_EQ(count.load(), 1);
  EXPECT_TRUE(in_range.load());
}

/// To be called before a fork. A worker that is still starting allocates, and AddressSanitizer,
/// other than glibc, lets its allocator's lock be forked while it is held.
void let_workers_start([[maybe_unused]] ThreadPool& pool) {
#ifdef MOESAIC_TEST_ASAN
  std::atomic<int> inside{0};
  pool.parallel_for(pool.threads(), [&](std::int64_t, int) {
    inside.fetch_add(1);
    while (inside.load() < pool.threads()) std::this_thread::yield();
  });
#endif
}

/// In a child; whether it ended with status 0 within ten seconds.
template <class Body>
bool child_succeeds(Body&& body) {
  const pid_t child = fork();
  if (child == 0) _exit(body() ? 0 : 1);
  for (int i = 0; i < 1000; ++i) {
    int status = 0;
    if (waitpid(child, &status, WNOHANG) == child)
      return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    std::this_thread::sleep_for(10ms);
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  return false;
}

/// Sum over chunks, computed in parallel.
std::int64_t parallel_sum(ThreadPool& pool, std::int64_t chunks) {
  std::atomic<std::int64_t> sum{0};
  pool.parallel_for(chunks, [&](std::int64_t chunk, int) { sum += chunk + 1; });
  return sum;
}
std::int64_t expected_sum(std::int64_t chunks) { return chunks * (chunks + 1) / 2; }

TEST(ThreadPool, RunsEveryChunkOnce) {
  for (const int threads : {1, 2, 3, 8}) {
    ThreadPool pool(threads);
    EXPECT_EQ(pool.threads(), threads);
    for (const std::int64_t chunks : {0, 1, 2, 3, 7, 1000}) expect_complete(pool, chunks);
  }
}

TEST(ThreadPool, RejectsNegativeThreads) { EXPECT_THROW(ThreadPool(-1), ConfigError); }

TEST(ThreadPool, ZeroMeansOneForEachCore) {
  EXPECT_GE(available_cpus(), 1);
  EXPECT_EQ(ThreadPool(0).threads(), default_threads());
}

TEST(ThreadPool, UsesSeveralThreads) {
  ThreadPool pool(3);
  std::atomic<int> inside{0};
  // Both chunks must be inside at once for either to end.
  pool.parallel_for(2, [&](std::int64_t, int) {
    inside.fetch_add(1);
    while (inside.load() < 2) std::this_thread::yield();
  });
  EXPECT_EQ(inside.load(), 2);
}

TEST(ThreadPool, SleepingWorkersWakeUp) {
  ThreadPool pool(4);
  std::this_thread::sleep_for(20ms);  // far beyond the spin
  std::atomic<int> inside{0};
  pool.parallel_for(4, [&](std::int64_t, int) {
    inside.fetch_add(1);
    while (inside.load() < 4) std::this_thread::yield();
  });
  EXPECT_EQ(inside.load(), 4);
}

TEST(ThreadPool, TicketsAscend) {
  ThreadPool pool(4);
  std::vector<std::vector<std::int64_t>> taken(4);
  pool.parallel_for(5000, [&](std::int64_t chunk, int thread) {
    taken[static_cast<std::size_t>(thread)].push_back(chunk);
  });
  for (const auto& list : taken) EXPECT_TRUE(std::is_sorted(list.begin(), list.end()));
}

TEST(ThreadPool, ThousandsOfTinyCalls) {
  ThreadPool pool(4);
  for (int call = 0; call < 20000; ++call) {
    const std::int64_t chunks = call % 7;
    ASSERT_EQ(parallel_sum(pool, chunks), expected_sum(chunks)) << call;
    if (call % 5000 == 0) std::this_thread::sleep_for(1ms);
  }
}

TEST(ThreadPool, NestedCallsRunInline) {
  ThreadPool pool(4);
  std::atomic<int> wrong{0};
  std::atomic<std::int64_t> sum{0};
  pool.parallel_for(50, [&](std::int64_t, int outer) {
    const auto id = std::this_thread::get_id();
    pool.parallel_for(20, [&](std::int64_t chunk, int inner) {
      if (inner != outer || std::this_thread::get_id() != id) ++wrong;
      sum += chunk + 1;
    });
  });
  EXPECT_EQ(wrong.load(), 0);
  EXPECT_EQ(sum.load(), 50 * expected_sum(20));
}

TEST(ThreadPool, NestedThroughAnotherPool) {
  ThreadPool first(3);
  ThreadPool second(3);
  std::atomic<std::int64_t> sum{0};
  std::atomic<int> wrong{0};
  first.parallel_for(20, [&](std::int64_t, int outer) {
    second.parallel_for(2, [&](std::int64_t, int) {
      first.parallel_for(4, [&](std::int64_t chunk, int inner) {
        if (inner < 0 || inner >= first.threads()) ++wrong;
        sum += chunk + 1;
      });
    });
    if (outer >= first.threads()) ++wrong;
  });
  EXPECT_EQ(sum.load(), 20 * 2 * expected_sum(4));
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ThreadPool, EightCallersAtOnce) {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  for (int caller = 0; caller < 8; ++caller) {
    callers.emplace_back([&, caller] {
      for (int call = 0; call < 500; ++call) {
        const std::int64_t chunks = 1 + (caller + call) % 23;
        if (parallel_sum(pool, chunks) != expected_sum(chunks)) ++wrong;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ThreadPool, ReturnsWithoutAWorkerThatTookNothing) {
  ThreadPool pool(2);
  std::atomic<bool> held{false};
  std::atomic<bool> release{false};
  // The only worker is held by the first caller's second chunk.
  std::thread owner([&] {
    pool.parallel_for(2, [&](std::int64_t, int) {
      held = true;
      while (!release.load()) std::this_thread::yield();
    });
  });
  while (!held.load()) std::this_thread::yield();
  EXPECT_EQ(parallel_sum(pool, 100), expected_sum(100));  // would hang if it waited
  release = true;
  owner.join();
}

TEST(ThreadPool, SurvivesCompetingThreads) {
  std::atomic<bool> stop{false};
  std::atomic<int> running{0};
  std::vector<std::thread> competitors;
  for (int i = 0; i < 2 * available_cpus(); ++i) {
    competitors.emplace_back([&] {
      ++running;
      while (!stop.load(std::memory_order_relaxed)) {
      }
    });
  }
  while (running.load() < static_cast<int>(competitors.size())) std::this_thread::yield();
  ThreadPool pool(4);
  const auto begin = Clock::now();
  for (int call = 0; call < 200; ++call) {
    std::atomic<std::int64_t> sum{0};
    pool.parallel_for(8, [&](std::int64_t chunk, int) {
      const auto end = Clock::now() + 20us;
      while (Clock::now() < end) {
      }
      sum += chunk + 1;
    });
    ASSERT_EQ(sum.load(), expected_sum(8));
  }
  const auto elapsed = Clock::now() - begin;
  stop = true;
  for (auto& competitor : competitors) competitor.join();
  RecordProperty("milliseconds", std::to_string(elapsed / 1ms));
  EXPECT_LT(elapsed, 20s);
}

TEST(ThreadPool, MakesAndDestroysMany) {
  for (int i = 0; i < 100; ++i) {
    ThreadPool pool(1 + i % 5);
    if (i % 2 == 0) {
      ASSERT_EQ(parallel_sum(pool, 9), expected_sum(9));
    }
  }
}

/// Nodes of so many cores each, on no CPUs in particular.
Topology nodes_of(const std::vector<std::int32_t>& cores) {
  Topology topology;
  for (const std::int32_t count : cores) topology.nodes.push_back({.cpus = {}, .cores = count});
  return topology;
}

constexpr auto kNever = std::chrono::seconds(1);  // longer than threads stay awake

TEST(ThreadPool, SeveralNodesRunEveryChunkOnce) {
  for (const auto& cores :
       std::vector<std::vector<std::int32_t>>{{1, 1}, {1, 3}, {2, 2, 2, 2}, {1, 20}, {5, 1, 1}}) {
    for (const int threads : {1, 2, 3, 8, 21}) {
      for (const auto patience : {0us, 20us, std::chrono::microseconds(kNever)}) {
        ThreadPool pool(threads, nodes_of(cores), patience);
        EXPECT_EQ(pool.nodes(), static_cast<int>(cores.size()));
        for (const std::int64_t chunks : {0, 1, 2, 3, 7, 300}) {
          expect_complete(pool, chunks);
          std::vector<std::atomic<int>> seen(cores.size() * static_cast<std::size_t>(chunks));
          pool.parallel_for_nodes(chunks, [&](std::int64_t chunk, int thread) {
            ASSERT_LT(thread, threads);
            seen[static_cast<std::size_t>(chunk)].fetch_add(1);
          });
          for (const auto& count : seen) ASSERT_EQ(count.load(), 1);
        }
      }
    }
  }
}

TEST(ThreadPool, NodesKeepTheirChunks) {
  // Nobody helps, so each node's chunks have threads of their own.
  ThreadPool pool(6, nodes_of({2, 1}), kNever);
  std::vector<std::atomic<int>> node_of(6);
  for (auto& node : node_of) node = -1;
  std::atomic<int> strangers{0};
  for (int call = 0; call < 200; ++call) {
    pool.parallel_for_nodes(40, [&](std::int64_t chunk, int thread) {
      const int node = chunk < 40 ? 0 : 1;
      const int before = node_of[static_cast<std::size_t>(thread)].exchange(node);
      if (before >= 0 && before != node) ++strangers;
    });
  }
  EXPECT_EQ(strangers.load(), 0);
  EXPECT_GT(std::ranges::count_if(node_of, [](const auto& node) { return node == 1; }), 0);
}

TEST(ThreadPool, ANodeThatIsHeldUpIsHelped) {
  ThreadPool pool(2, nodes_of({1, 1}), 20us);
  // One chunk of each pair ends only when the other has begun: with one thread for each node, the
  // second chunk of a node needs the other node's thread.
  for (int call = 0; call < 20; ++call) {
    std::atomic<int> inside{0};
    pool.parallel_for_nodes(2, [&](std::int64_t chunk, int) {
      if (chunk < 2) return;
      inside.fetch_add(1);
      while (inside.load() < 2) std::this_thread::yield();
    });
    EXPECT_EQ(inside.load(), 2);
  }
}

TEST(ThreadPool, NodesWithoutThreadsAreEverybodys) {
  ThreadPool pool(2, nodes_of({1, 1, 1, 1}), kNever);
  std::atomic<int> inside{0};
  pool.parallel_for_nodes(1, [&](std::int64_t, int) { inside.fetch_add(1); });
  EXPECT_EQ(inside.load(), 4);
}

TEST(ThreadPool, ManyThreadsShareNoTicket) {
  // More threads than take from one ticket: all of them come to work, and to the end.
  ThreadPool pool(20, nodes_of({20}));
  std::this_thread::sleep_for(20ms);  // far beyond the spin
  std::atomic<int> inside{0};
  pool.parallel_for(20, [&](std::int64_t, int) {
    inside.fetch_add(1);
    while (inside.load() < 20) std::this_thread::yield();
  });
  EXPECT_EQ(inside.load(), 20);
  for (int call = 0; call < 500; ++call) {
    ASSERT_EQ(parallel_sum(pool, call % 50), expected_sum(call % 50));
  }
}

TEST(ThreadPool, RejectsATopologyWithoutNodes) {
  EXPECT_THROW(ThreadPool(2, Topology{}), ConfigError);
}

TEST(ThreadPool, SharedByThreadCount) {
  const auto two = ThreadPool::shared(2);
  EXPECT_EQ(two, ThreadPool::shared(2));
  EXPECT_NE(two, ThreadPool::shared(3));
  EXPECT_EQ(two, ThreadPool::shared(2));
  EXPECT_EQ(ThreadPool::shared(0), ThreadPool::shared(default_threads()));
  EXPECT_NE(two, ThreadPool::shared(2, 2));
  EXPECT_EQ(ThreadPool::shared(2, 2)->nodes(), 2);
}

TEST(ThreadPool, SharedFromManyThreads) {
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 8; ++i) {
    callers.emplace_back([&wrong, i] {
      for (int j = 0; j < 50; ++j) {
        const int threads = 1 + (i + j) % 4;
        const auto pool = ThreadPool::shared(threads);
        if (pool->threads() != threads || parallel_sum(*pool, 5) != expected_sum(5)) ++wrong;
      }
    });
  }
  for (auto& caller : callers) caller.join();
  EXPECT_EQ(wrong.load(), 0);
}

TEST(ThreadPool, ChildOfForkStartsItsOwnWorkers) {
#ifdef MOESAIC_TEST_TSAN
  GTEST_SKIP() << "ThreadSanitizer allows no new threads after a fork";
#endif
  ThreadPool own(3);
  const auto shared = ThreadPool::shared(2);
  let_workers_start(own);
  let_workers_start(*shared);
  ASSERT_EQ(parallel_sum(own, 50), expected_sum(50));
  ASSERT_EQ(parallel_sum(*shared, 50), expected_sum(50));
  EXPECT_TRUE(child_succeeds([&] {
    // Two chunks inside at once: a worker of the child runs one of them.
    std::atomic<int> inside{0};
    own.parallel_for(2, [&](std::int64_t, int) {
      inside.fetch_add(1);
      while (inside.load() < 2) std::this_thread::yield();
    });
    ThreadPool fresh(2);
    return parallel_sum(own, 50) == expected_sum(50) &&
           parallel_sum(*shared, 50) == expected_sum(50) &&
           parallel_sum(*ThreadPool::shared(2), 9) == expected_sum(9) &&
           parallel_sum(fresh, 9) == expected_sum(9);
  }));
  EXPECT_EQ(parallel_sum(own, 50), expected_sum(50));  // the parent's workers live on
}

TEST(ThreadPool, ForkWhileAnotherThreadIsInACall) {
#ifdef MOESAIC_TEST_TSAN
  GTEST_SKIP() << "ThreadSanitizer allows no new threads after a fork";
#endif
  auto pool = std::make_unique<ThreadPool>(3);
  let_workers_start(*pool);
  std::atomic<bool> held{false};
  std::atomic<bool> release{false};
  std::thread owner([&] {
    pool->parallel_for(3, [&](std::int64_t, int) {
      held = true;
      while (!release.load()) std::this_thread::yield();
    });
  });
  while (!held.load()) std::this_thread::yield();
  EXPECT_TRUE(child_succeeds([&] {
    const bool right = parallel_sum(*pool, 50) == expected_sum(50);
    pool.reset();  // joins the child's own workers
    return right;
  }));
  release = true;
  owner.join();
}

TEST(ThreadPool, UnusedPoolOfAForkedChildCanBeDestroyed) {
  auto pool = std::make_unique<ThreadPool>(3);
  let_workers_start(*pool);
  EXPECT_TRUE(child_succeeds([&] {
    pool.reset();
    return true;
  }));
}

TEST(ThreadPool, HotCallsAreShort) {
#if defined(MOESAIC_TEST_TSAN) || !defined(NDEBUG)
  GTEST_SKIP() << "timing of an optimised build";
#endif
  ThreadPool pool(2);
  double best = 1e9;  // microseconds per call; the best of many rounds ignores the machine's noise
  for (int round = 0; round < 50; ++round) {
    constexpr int kCalls = 1000;
    const auto begin = Clock::now();
    for (int call = 0; call < kCalls; ++call) pool.parallel_for(2, [](std::int64_t, int) {});
    const std::chrono::duration<double, std::micro> elapsed = Clock::now() - begin;
    best = std::min(best, elapsed.count() / kCalls);
  }
  RecordProperty("microseconds", std::to_string(best));
  EXPECT_LT(best, 5.0);
}

class CgroupTree : public testing::Test {
 protected:
  void SetUp() override {
    root_ = std::filesystem::path(testing::TempDir()) /
            ("moesaic_cgroup_" + std::to_string(getpid()) + "_" +
             testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::create_directories(root_);
  }
  void TearDown() override { std::filesystem::remove_all(root_); }
  void write(const std::string& path, const std::string& text) {
    std::filesystem::create_directories((root_ / path).parent_path());
    std::ofstream(root_ / path) << text;
  }
  std::optional<double> limit() { return cgroup_cpu_limit(root_ / "cgroup", root_ / "fs"); }
  std::filesystem::path root_;
};

TEST_F(CgroupTree, NoFilesNoLimit) { EXPECT_FALSE(limit()); }

TEST_F(CgroupTree, Version2TakesTheTightestParent) {
  write("cgroup", "0::/a/b\n");
  write("fs/a/b/cpu.max", "max 100000\n");
  EXPECT_FALSE(limit());
  write("fs/a/cpu.max", "150000 100000\n");
  EXPECT_EQ(limit(), 1.5);
  write("fs/cpu.max", "400000 100000\n");
  EXPECT_EQ(limit(), 1.5);
  write("fs/a/b/cpu.max", "50000 100000\n");
  EXPECT_EQ(limit(), 0.5);
}

TEST_F(CgroupTree, Version2PathOutsideTheMount) {
  write("cgroup", "0::/host/only/path\n");
  write("fs/cpu.max", "300000 100000\n");
  EXPECT_EQ(limit(), 3.0);
}

TEST_F(CgroupTree, Version1) {
  write("cgroup", "12:cpuset:/x\n4:cpu,cpuacct:/a\n0::/\n");
  write("fs/cpu,cpuacct/a/cpu.cfs_quota_us", "-1\n");
  write("fs/cpu,cpuacct/a/cpu.cfs_period_us", "100000\n");
  EXPECT_FALSE(limit());
  write("fs/cpu,cpuacct/a/cpu.cfs_quota_us", "250000\n");
  EXPECT_EQ(limit(), 2.5);
}

}  // namespace
}  // namespace moesaic
