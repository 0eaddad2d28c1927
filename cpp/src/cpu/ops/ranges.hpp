#pragma once

/// Splitting [0, items) over a pool. The split depends on the sizes and the number of threads, so
/// only work whose items do not influence each other may use it.

#include <algorithm>
#include <cstdint>

#include "moesaic/thread_pool.hpp"

namespace moesaic::cpu {

/// Work (in simple f32 operations, about 10 us of them) below which waking a thread costs more than
/// it saves.
inline constexpr std::int64_t kMinChunkWork = 65536;

/// Chunks for `items` items of `work_per_item` operations: at least kMinChunkWork each, and a few
/// per thread, so that a thread that is late leaves its share to the others.
inline std::int64_t chunk_count(std::int64_t items, std::int64_t work_per_item, int threads) {
  if (threads <= 1) return std::min<std::int64_t>(items, 1);
  const std::int64_t min_items =
      std::max<std::int64_t>(1, kMinChunkWork / std::max<std::int64_t>(1, work_per_item));
  return std::clamp<std::int64_t>(items / min_items, items > 0 ? 1 : 0, std::int64_t{4} * threads);
}

/// Calls body(begin, end, thread) for ranges that cover [0, items) in order.
template <class Body>
void parallel_ranges(ThreadPool& pool, std::int64_t items, std::int64_t work_per_item,
                     Body&& body) {
  const std::int64_t chunks = chunk_count(items, work_per_item, pool.threads());
  pool.parallel_for(chunks, [&](std::int64_t chunk, int thread) {
    body(items * chunk / chunks, items * (chunk + 1) / chunks, thread);
  });
}

}  // namespace moesaic::cpu
