#include "runtime/block.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <bit>
#include <cstdio>
#include <cstring>
#include <exception>
#include <new>

#include "runtime/sanitizers.hpp"

namespace moesaic::emulation {

Block* resident = nullptr;
char launch_end_clock;

namespace {

constexpr std::size_t kStaticSharedLimit = 48 * 1024;
constexpr std::size_t kWatchedGap = 64;

}  // namespace

std::string text(Dim3 d) {
  return "(" + std::to_string(d.x) + "," + std::to_string(d.y) + "," + std::to_string(d.z) + ")";
}

std::string text(Site site) {
  if (!site.operation) return "its start";
  return std::string(site.operation) + " at " + site.where.file_name() + ":" +
         std::to_string(site.where.line());
}

// --- shared memory

Arena::~Arena() {
  if (memory_) munmap(memory_, kBytes + kClockBytes);
}

void Arena::reset() {
  if (memory_) {
    unpoison(memory_, kBytes);
    if (race_checked()) {
      munmap(memory_, kBytes + kClockBytes);
      memory_ = nullptr;
    }
  }
  if (!memory_) {
    void* memory = mmap(nullptr, kBytes + kClockBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
  }
  poison(memory_, kBytes);
  used_ = 0;
}

char* Arena::allocate(std::size_t bytes, std::size_t alignment) {
  std::size_t start = used_ + kWatchedGap;
  start = (start + alignment - 1) / alignment * alignment;
  if (start + bytes + kWatchedGap > kBytes) return nullptr;
  used_ = start + bytes;
  unpoison(memory_ + start, bytes);
  std::memset(memory_ + start, 0xFF, bytes);
  return memory_ + start;
}

bool Arena::contains(const void* address, std::size_t bytes) const {
  const char* p = static_cast<const char*>(address);
  return p >= memory_ && p + bytes <= memory_ + used_;
}

void* Block::static_shared(const void* key, std::size_t bytes, std::size_t alignment, Site site) {
  for (const StaticArray& array : statics_) {
    if (array.key == key) return array.memory;
  }
  shared_bytes_ += bytes;
  void* memory = arena_.allocate(bytes, std::max<std::size_t>(alignment, 16));
  if (!memory || bytes > kStaticSharedLimit || shared_bytes_ > options().shared_limit) {
    fail("shared memory over its limit: " + std::to_string(shared_bytes_) + " bytes in all (" +
             std::to_string(options().shared_limit) + " allowed), " + std::to_string(bytes) +
             " in this static array (" + std::to_string(kStaticSharedLimit) + " allowed)",
         site);
  }
  statics_.push_back({key, memory});
  return memory;
}

bool Block::is_shared(const void* address, std::size_t bytes) const {
  return arena_.contains(address, bytes);
}

// --- life of a block

void Block::start(PlacePool& places, Dim3 block, Dim3 block_size, Dim3 grid_size,
                  std::size_t dynamic_shared, uint64_t seed, void (*entry)(void*), void* context,
                  Order order) {
  const auto count = static_cast<unsigned>(block_size.count());
  index_ = block;
  entry_ = entry;
  context_ = context;
  order_ = order;
  random_ = Random(seed ^ (uint64_t{block.x} << 20 ^ uint64_t{block.y} << 10 ^ block.z));
  copies_wander_ = seed != 0;
  live_ = count;
  at_barrier_ = 0;
  failure_.clear();
  statics_.clear();
  polling_.clear();
  ready_.clear();
  warps_.assign((count + kWarpSize - 1) / kWarpSize, Warp{});
  arena_.reset();
  shared_bytes_ = dynamic_shared;
  dynamic_ = arena_.allocate(dynamic_shared, 1024);
  threads_.resize(count);
  for (unsigned i = 0; i < count; i++) {
    Thread& t = threads_[i];
    t.position = {
        Dim3(i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y),
        block,
        block_size,
        grid_size,
        i % kWarpSize,
        i / kWarpSize};
    t.state = State::ready;
    t.site = {};
    t.barrier_parity = t.warp_parity = 0;
    t.waited_for_grid = false;
    t.open_copies.clear();
    t.copy_groups.clear();
    t.arrivals.clear();
    t.fiber.start(places.take(), i, &Block::run_thread, this);
    warps_[t.position.warp].live |= 1u << t.position.lane;
    ready_.push_back(i);
  }
}

void Block::end(PlacePool& places) {
  for (Thread& t : threads_) places.give_back(t.fiber.retire(&launch_end_clock));
  threads_.clear();
}

void Block::run_thread(void* self) {
  Block& block = *static_cast<Block*>(self);
  acquire(launch_start(block.order_ == Order::dependent ? 1 : 0));
  try {
    block.entry_(block.context_);
    const Unseen unseen;
    block.leave();
  } catch (const std::exception& error) {
    const Unseen unseen;
    block.failure_ = error.what();
  }
}

void Block::leave() {
  complete_arrivals();
  Thread& t = running();
  bool in_flight = !t.open_copies.empty();
  for (const auto& group : t.copy_groups) in_flight |= !group.empty();
  if (in_flight) fail("a thread exits with asynchronous copies in flight", t.site);
  if (order_ == Order::dependent && !t.waited_for_grid) {
    // Its successors could then begin before its predecessor has ended.
    fail("a thread of a dependent grid exits without griddepcontrol_wait", t.site);
  }
  t.state = State::done;
  live_--;
  Warp& warp = warps_[t.position.warp];
  warp.live &= ~(1u << t.position.lane);
  if (at_barrier_ && at_barrier_ == live_) release_block_barrier();
  if (warp.arrived) {
    // Lanes that wait for this one alone go on without it.
    const unsigned first = t.position.warp * kWarpSize;
    for (unsigned lane = 0; lane < kWarpSize; lane++) {
      if (warp.arrived >> lane & 1) {
        const uint32_t mask = threads_[first + lane].mask;
        if ((warp.arrived & mask) == (warp.live & mask)) {
          complete_warp(t.position.warp, mask);
          break;
        }
      }
    }
  }
}

void Block::step(unsigned thread) {
  Thread& t = threads_[thread];
  running_ = thread;
  position = t.position;
  resident = this;
  last_step_polled_ = false;
  counters().switches++;
  t.fiber.resume();
  resident = nullptr;
}

void Block::suspend() {
  const Seen seen;
  running().fiber.suspend();
}

// Copies that a barrier counts land by themselves: at the latest when their thread stops to wait.
void Block::wait_as(State state, Site site) {
  complete_arrivals();
  Thread& t = running();
  t.state = state;
  t.site = site;
}

void Block::wake(unsigned thread) {
  threads_[thread].state = State::ready;
  ready_.push_back(thread);
}

void Block::revive_polling() {
  for (unsigned thread : polling_) wake(thread);
  polling_.clear();
}

void Block::yield(Site site) {
  if (!copies_wander_ || random_.below(4) == 0) complete_arrivals();
  polling_.push_back(running_);
  last_step_polled_ = true;
  running().state = State::polling;
  running().site = site;
  suspend();
}

void Block::fail(const std::string& what, Site site) {
  throw Fault(what + "\n  in " + text(site) + "\n  by thread " + text(running().position.thread) +
              " of block " + text(index_));
}

std::string Block::waiting_threads() const {
  constexpr unsigned kShown = 6;
  std::string lines;
  unsigned shown = 0;
  for (const Thread& t : threads_) {
    if (t.state == State::done) continue;
    if (shown++ == kShown) return lines + "\n  ...";
    lines += "\n  thread " + text(t.position.thread) + " of block " + text(index_) + " waits in " +
             text(t.site);
    if (t.state == State::at_warp) {
      char mask[16];
      snprintf(mask, sizeof mask, "%08x", t.mask);
      lines += std::string(" with mask ") + mask;
    }
  }
  return lines;
}

}  // namespace moesaic::emulation
