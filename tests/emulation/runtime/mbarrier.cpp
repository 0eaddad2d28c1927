// The barrier object of PTX's mbarrier instructions, as the emulator lays it out in its 8 bytes.
#include <cstring>

#include "runtime/block.hpp"
#include "runtime/sanitizers.hpp"

namespace moesaic::emulation {
namespace {

struct Barrier {
  uint16_t tag;  // poisoned memory is no barrier
  uint16_t arrivals;
  uint16_t pending;
  uint16_t phase;
};
constexpr uint16_t kTag = 0xBA44;

Barrier load(const uint64_t* barrier, Site site) {
  Barrier b;
  std::memcpy(&b, barrier, sizeof b);
  if (b.tag != kTag) resident->fail("a barrier is used that was not initialised", site);
  return b;
}

void store(uint64_t* barrier, Barrier b) { std::memcpy(barrier, &b, sizeof b); }

}  // namespace

void mbarrier_init(uint64_t* barrier, unsigned arrivals, Site site) {
  const Unseen unseen;
  if (arrivals == 0 || arrivals > 0xFFFF || reinterpret_cast<std::uintptr_t>(barrier) % 8 != 0) {
    resident->fail("a barrier takes 1 to 65535 arrivals and is 8-byte aligned", site);
  }
  const auto n = static_cast<uint16_t>(arrivals);
  store(barrier, {kTag, n, n, 0});
}

void mbarrier_arrive(uint64_t* barrier, Site site) {
  const Unseen unseen;
  Barrier b = load(barrier, site);
  release(barrier);
  if (--b.pending == 0) {
    b.pending = b.arrivals;
    b.phase++;
  }
  store(barrier, b);
}

void mbarrier_arrive_after_copies(uint64_t* barrier, Site site) {
  const Unseen unseen;
  resident->arrive_after_copies(barrier, site);
}

void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site) {
  const Unseen unseen;
  while (load(barrier, site).phase % 2 == parity % 2) resident->yield(site);
  acquire(barrier);
}

}  // namespace moesaic::emulation
