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
/// And above which (some 10 ms) a call would be slow to notice that it is interrupted.
inline constexpr std::int64_t kMaxChunkWork = std::int64_t{1} << 26;

/// Chunks for `items` items of `work_per_item` operations: of kMinChunkWork to kMaxChunkWork, and
/// between these a few per thread, so that a thread that is late leaves its share to the others.
inline std::int64_t chunk_count(std::int64_t items, std::int64_t work_per_item, int threads) {
  const std::int64_t work = std::max<std::int64_t>(1, work_per_item);
  const std::int64_t min_items = std::max<std::int64_t>(1, kMinChunkWork / work);
  const std::int64_t max_items = std::max<std::int64_t>(1, kMaxChunkWork / work);
  const std::int64_t least = (items + max_items - 1) / max_items;
  const std::int64_t wanted = threads <= 1 ? 1 : std::int64_t{4} * threads;
  return std::max(least, std::min(items / min_items, wanted));
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
