#include "launch.h"
#include "plan/align.cuh"
#include "plan/bucket_plan.cuh"
#include "plan/tiles.cuh"

namespace moesaic::cuda {
namespace {

int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// Pairs per tile and number of tiles, from the number of pairs.
int64_t tile_pairs(int64_t num_pairs) {
  const int64_t even = (num_pairs + kMaxSortTiles - 1) / kMaxSortTiles;
  return even < kTilePairs ? kTilePairs : round_up(even, kSortThreads);
}
int64_t tile_count(int64_t num_pairs) {
  return (num_pairs + tile_pairs(num_pairs) - 1) / tile_pairs(num_pairs);
}

}  // namespace

int64_t plan_scratch_bytes(int64_t num_pairs, int32_t num_experts) {
  if (num_pairs <= kSmallPairs) return 0;
  return tile_count(num_pairs) * num_experts * int64_t{sizeof(int32_t)};
}

int32_t load_plan_kernels() {
  return dev::load(sort_small_kernel, sort_count_kernel, sort_scan_kernel, sort_place_kernel,
                   align_kernel, tiles_kernel);
}

int32_t launch_bucket_plan(const op::BucketPlan& args, Stream stream) {
  if (args.num_experts > kMaxExperts) return kUnsupported;
  const auto queue = static_cast<dev::Stream>(stream);
  const dim3 block(kSortThreads);
  if (args.routing.num_pairs() <= kSmallPairs) {
    return dev::launch_dependent(sort_small_kernel, dim3(1), block, 0, queue, args);
  }
  const int64_t tile = tile_pairs(args.routing.num_pairs());
  const auto tiles = static_cast<unsigned>(tile_count(args.routing.num_pairs()));
  int32_t status =
      dev::launch_dependent(sort_count_kernel, dim3(tiles), block, 0, queue, args, tile);
  if (status != kOk) return status;
  status = dev::launch_dependent(sort_scan_kernel, dim3(1), block, 0, queue, args,
                                 static_cast<int32_t>(tiles));
  if (status != kOk) return status;
  return dev::launch_dependent(sort_place_kernel, dim3(tiles), block, 0, queue, args, tile);
}

int32_t launch_align(const op::Align& args, Stream stream) {
  if (args.num_experts > kMaxExperts) return kUnsupported;
  const int64_t capacity = args.block_capacity * args.block_size;
  // One block at least: num_post_pad is written even when there are no pairs.
  const int64_t blocks = capacity == 0 ? 1 : (capacity + kAlignEntries - 1) / kAlignEntries;
  return dev::launch_dependent(align_kernel, dim3(static_cast<unsigned>(blocks)),
                               dim3(kAlignThreads), 0, static_cast<dev::Stream>(stream), args);
}

int32_t launch_tiles(const TilesArgs& args, Stream stream) {
  return dev::launch_dependent(tiles_kernel, dim3(1), dim3(kTilesThreads), 0,
                               static_cast<dev::Stream>(stream), args);
}

}  // namespace moesaic::cuda
