/// What the thread pool alone costs: calls of empty chunks, by threads, nodes and chunks per thread.
///
///     cmake --build build/dev --target pool_bench && build/dev/tests/pool_bench [threads..]
///
/// A round measures every row once; a row shows the median and the best over the rounds, in
/// microseconds per call.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "moesaic/thread_pool.hpp"

namespace {

using moesaic::ThreadPool;
using Clock = std::chrono::steady_clock;

struct Row {
  int threads, nodes, chunks;  ///< chunks per thread
  std::vector<double> us{};
};

double microseconds_per_call(ThreadPool& pool, std::int64_t chunks) {
  constexpr int kCalls = 2000;
  const auto begin = Clock::now();
  for (int call = 0; call < kCalls; ++call) pool.parallel_for(chunks, [](std::int64_t, int) {});
  return std::chrono::duration<double, std::micro>(Clock::now() - begin).count() / kCalls;
}

}  // namespace

int main(int argc, char** argv) {
  constexpr int kRounds = 25;
  std::vector<int> counts;
  for (int i = 1; i < argc; ++i) counts.push_back(std::max(1, std::atoi(argv[i])));
  if (counts.empty()) {
    for (int threads = 1; threads < moesaic::default_threads(); threads *= 2) {
      counts.push_back(threads);
    }
    counts.push_back(moesaic::default_threads());
  }
  std::vector<Row> rows;
  for (const int threads : counts) {
    for (const int nodes : {1, 2}) {
      if (nodes > threads) continue;
      for (const int chunks : {1, 8}) rows.push_back({threads, nodes, chunks});
    }
  }
  for (int round = 0; round < kRounds; ++round) {
    std::shared_ptr<ThreadPool> pool;
    for (Row& row : rows) {
      pool = ThreadPool::shared(row.threads, row.nodes);
      microseconds_per_call(*pool, row.threads);  // the workers come from their sleep
      row.us.push_back(microseconds_per_call(*pool, std::int64_t{row.threads} * row.chunks));
    }
  }
  std::printf("threads nodes chunks/thread   median us     best us\n");
  for (Row& row : rows) {
    std::ranges::sort(row.us);
    std::printf("%7d %5d %13d %11.2f %11.2f\n", row.threads, row.nodes, row.chunks,
                row.us[row.us.size() / 2], row.us.front());
  }
}
