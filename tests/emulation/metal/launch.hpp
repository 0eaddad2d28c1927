// Dispatches an emulated Metal kernel; it has run when the call returns. Faults are thrown.
#pragma once

#include "flush.hpp"
#include "include/metal_stdlib"

namespace moesaic::emulation {

inline constexpr std::size_t kThreadgroupMemory = 32 * 1024;

// `body(position, simdgroup, lane)` per thread; `threads` is a multiple of the simdgroup's 32.
template <class Body>
void metal_launch(Dim3 groups, unsigned threads, Body&& body) {
  if (threads == 0 || threads % kWarpSize != 0) throw Fault("simdgroups are full");
  const struct Limit {
    std::size_t before = std::exchange(options().shared_limit, kThreadgroupMemory);
    ~Limit() { options().shared_limit = before; }
  } limit;
  const FlushedSubnormals flushed;
  launch(groups, Dim3(threads), 0, [&] {
    body(uint3{position.block.x, position.block.y, position.block.z}, position.warp, position.lane);
  });
}

}  // namespace moesaic::emulation
