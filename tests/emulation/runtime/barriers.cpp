// Where threads of a block meet: block barriers, warps.
#include <bit>
#include <cstring>

#include "runtime/block.hpp"
#include "runtime/sanitizers.hpp"

namespace moesaic::emulation {
namespace {

// Clocks in a block's arena: two of the block barrier, two per warp.
constexpr std::size_t kBarrierClock = 0;
constexpr std::size_t kWarpClock = 8;

}  // namespace

static bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
static bool same_site(const Site& a, const Site& b) {
  return a.where.line() == b.where.line() && a.where.column() == b.where.column() &&
         same_text(a.operation, b.operation) && same_text(a.where.file_name(), b.where.file_name());
}

void Block::block_barrier(Site site) {
  Thread& t = running();
  if (at_barrier_ == 0) barrier_site_ = site;
  if (!same_site(barrier_site_, site)) {
    fail("threads of one block meet in different barriers; the other one is " + text(barrier_site_),
         site);
  }
  wait_as(State::at_block, site);
  char* clock = arena_.clock(kBarrierClock + (t.barrier_parity ^= 1));
  release(clock);
  if (++at_barrier_ == live_) release_block_barrier();
  suspend();
  acquire(clock);
}

void Block::release_block_barrier() {
  for (unsigned i = 0; i < threads_.size(); i++) {
    if (threads_[i].state == State::at_block) wake(i);
  }
  at_barrier_ = 0;
}

void Block::warp_collective(uint32_t mask, void* mine, Collective body, Site site) {
  Thread& t = running();
  Warp& warp = warps_[t.position.warp];
  if (!(mask >> t.position.lane & 1)) fail("a lane is not in its own mask", site);
  const unsigned first = t.position.warp * kWarpSize;
  // Lanes of the mask that wait have agreed among themselves, so one of them speaks for all; others
  // must wait for somebody else.
  const uint32_t waiting = warp.arrived & mask;
  uint32_t to_compare = (warp.arrived & ~mask) | (waiting & -waiting);
  for (; to_compare; to_compare &= to_compare - 1) {
    const Thread& other = threads_[first + static_cast<unsigned>(std::countr_zero(to_compare))];
    if (!(other.mask & mask)) continue;
    if (other.mask != mask || other.body != body || !same_site(other.site, site)) {
      fail(
          "lanes of one warp meet in different operations or with different masks; the other one "
          "is " +
              text(other.site),
          site);
    }
  }
  wait_as(State::at_warp, site);
  t.mask = mask;
  t.deposit = mine;
  t.body = body;
  warp.arrived |= 1u << t.position.lane;
  if ((warp.arrived & mask) == (warp.live & mask)) complete_warp(t.position.warp, mask);
  suspend();
}

void Block::complete_warp(unsigned warp, uint32_t mask) {
  const unsigned first = warp * kWarpSize;
  const uint32_t present = warps_[warp].arrived & mask;
  void* lanes[kWarpSize] = {};
  Collective body = nullptr;
  for (unsigned lane = 0; lane < kWarpSize; lane++) {
    if (present >> lane & 1) {
      lanes[lane] = threads_[first + lane].deposit;
      body = threads_[first + lane].body;
    }
  }
  if (body) body(lanes, mask);
  warps_[warp].arrived &= ~mask;
  for (unsigned lane = 0; lane < kWarpSize; lane++) {
    if (present >> lane & 1) wake(first + lane);
  }
}

void Block::warp_barrier(uint32_t mask, Site site) {
  complete_arrivals();
  Thread& t = running();
  char* clock = arena_.clock(kWarpClock + 2 * t.position.warp + (t.warp_parity ^= 1));
  release(clock);
  int nothing = 0;
  warp_collective(mask, &nothing, nullptr, site);
  acquire(clock);
}

}  // namespace moesaic::emulation
