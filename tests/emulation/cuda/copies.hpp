// cp.async and mbarrier.
#pragma once

#include <cstdint>

#include "cuda/warp.hpp"

namespace moesaic::emulation {

// Both run in the kernel's translation unit, so that a race checker sees them as the thread's own.
inline void land_copy(void* shared, const void* global) {
  auto* to = static_cast<uint32_t*>(shared);
  const auto* from = static_cast<const uint32_t*>(global);
  for (int i = 0; i < 4; i++) to[i] = from[i];
}

// From the issue on the destination holds nothing: all ones until the copy lands.
inline void issue_copy(void* shared, const void* global, Site site) {
  if (reinterpret_cast<std::uintptr_t>(shared) % 16 != 0 || !is_shared(shared, 16)) {
    fail("the destination of a copy is not 16 aligned bytes of shared memory", site);
  }
  if (reinterpret_cast<std::uintptr_t>(global) % 16 != 0 || is_shared(global, 16)) {
    fail("the source of a copy is not 16 aligned bytes of global memory", site);
  }
  for (int i = 0; i < 4; i++) static_cast<uint32_t*>(shared)[i] = 0xFFFFFFFFu;
  for (int i = 0; i < 4; i++) (void)static_cast<const volatile uint32_t*>(global)[i];
  copy_async(shared, global, land_copy, site);
}

}  // namespace moesaic::emulation

namespace moesaic::dev {

inline void cp_async16(void* shared, const void* global, MOESAIC_HERE) {
  emulation::issue_copy(shared, global, {"cp_async16", where});
}
inline void cp_async_weight16(void* shared, const void* global, MOESAIC_HERE) {
  emulation::count_weight_bytes(16);
  emulation::issue_copy(shared, global, {"cp_async_weight16", where});
}
inline void cp_async_commit() { emulation::copy_commit(); }
template <int N>
void cp_async_wait() {
  emulation::copy_wait(N);
}

// The barrier object itself is touched here, in sight of a race checker: using it before another
// thread's initialisation is ordered before is a race.
inline void mbarrier_init(uint64_t* barrier, unsigned arrivals, MOESAIC_HERE) {
  *barrier = 0;
  emulation::mbarrier_init(barrier, arrivals, {"mbarrier_init", where});
}
inline void mbarrier_arrive(uint64_t* barrier, MOESAIC_HERE) {
  (void)*static_cast<volatile uint64_t*>(barrier);
  emulation::mbarrier_arrive(barrier, {"mbarrier_arrive", where});
}
inline void mbarrier_arrive_after_copies(uint64_t* barrier, MOESAIC_HERE) {
  (void)*static_cast<volatile uint64_t*>(barrier);
  emulation::mbarrier_arrive_after_copies(barrier, {"mbarrier_arrive_after_copies", where});
}
inline void mbarrier_wait(uint64_t* barrier, unsigned parity, MOESAIC_HERE) {
  (void)*static_cast<volatile uint64_t*>(barrier);
  emulation::mbarrier_wait(barrier, parity, {"mbarrier_wait", where});
}

}  // namespace moesaic::dev
