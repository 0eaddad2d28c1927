// One thread block while it is resident: its threads, its shared memory and what they wait for.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/emulator.hpp"
#include "runtime/fiber.hpp"
#include "runtime/random.hpp"

namespace moesaic::emulation {

enum class State { ready, polling, at_warp, at_block, done };

struct Copy {
  void* shared;
  const void* global;
  CopyBody body;
};

struct Arrival {
  uint64_t* barrier;
  Site site;
};

struct Thread {
  Fiber fiber;
  Position position;
  State state = State::ready;
  Site site{};
  // The collective this thread waits in.
  uint32_t mask = 0;
  void* deposit = nullptr;
  Collective body = nullptr;
  unsigned barrier_parity = 0;
  unsigned warp_parity = 0;
  bool waited_for_grid = false;
  // Copies issued since the last commit, and those of earlier groups, oldest first.
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;
  // Due once all copies so far have landed.
  std::vector<Arrival> arrivals;
};

// A mapping of its own. Under a race checker it is mapped afresh for every block, so that neither
// the memory nor the synchronisation clocks in it carry anything over from the block before.
class Arena {
 public:
  static constexpr std::size_t kBytes = 256 * 1024;

  Arena() = default;
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;
  ~Arena();

  void reset();
  // Poisoned memory with a gap below it that ASan watches.
  char* allocate(std::size_t bytes, std::size_t alignment);
  bool contains(const void* address, std::size_t bytes) const;
  // Addresses for happens-before edges, outside the kernel's memory.
  char* clock(std::size_t index) const { return memory_ + kBytes + index; }

 private:
  static constexpr std::size_t kClockBytes = 4096;

  char* memory_ = nullptr;
  std::size_t used_ = 0;
};

class Block {
 public:
  void start(PlacePool& places, Dim3 block, Dim3 block_size, Dim3 grid_size,
             std::size_t dynamic_shared, uint64_t seed, void (*entry)(void*), void* context,
             Order order);
  // Gives back what a finished or abandoned block holds.
  void end(PlacePool& places);

  bool done() const { return live_ == 0; }
  Dim3 index() const { return index_; }
  // Runs one thread until it waits.
  void step(unsigned thread);
  // The threads that can run, in the order they became able to; the scheduler takes from it.
  std::vector<unsigned>& ready() { return ready_; }
  // Makes polling threads ready again.
  void revive_polling();
  unsigned warp_of(unsigned thread) const { return threads_[thread].position.warp; }
  unsigned warps() const { return static_cast<unsigned>(warps_.size()); }
  unsigned live() const { return live_; }
  bool last_step_polled() const { return last_step_polled_; }
  Random& random() { return random_; }
  // "thread (3,0,0) waits in __syncthreads at file:line" for the first few threads.
  std::string waiting_threads() const;

  // Called on a fiber, for the running thread.
  void warp_collective(uint32_t mask, void* mine, Collective body, Site site);
  void warp_barrier(uint32_t mask, Site site);
  void block_barrier(Site site);
  void yield(Site site);
  void* static_shared(const void* key, std::size_t bytes, std::size_t alignment, Site site);
  void* dynamic_shared() const { return dynamic_; }
  bool is_shared(const void* address, std::size_t bytes) const;
  void copy_async(Copy copy, Site site);
  void copy_commit();
  void copy_wait(unsigned groups_left);
  void arrive_after_copies(uint64_t* barrier, Site site);
  void grid_wait() { running().waited_for_grid = true; }
  [[noreturn]] void fail(const std::string& what, Site site);
  // What the last step failed with; empty if it did not.
  const std::string& failure() const { return failure_; }

 private:
  struct Warp {
    uint32_t live = 0;
    uint32_t arrived = 0;
  };
  struct StaticArray {
    const void* key;
    void* memory;
  };

  static void run_thread(void* thread);
  void suspend();
  void wait_as(State state, Site site);
  void wake(unsigned thread);
  void leave();
  void release_block_barrier();
  void complete_warp(unsigned warp, uint32_t mask);
  void land(const Copy& copy);
  void land(std::vector<Copy>& copies);
  void land_some(std::vector<Copy>& copies);
  void complete_arrivals();
  Thread& running() { return threads_[running_]; }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> ready_, polling_;
  std::vector<StaticArray> statics_;
  Arena arena_;
  void* dynamic_ = nullptr;
  std::size_t shared_bytes_ = 0;
  Dim3 index_;
  unsigned live_ = 0;
  unsigned at_barrier_ = 0;
  Site barrier_site_{};
  unsigned running_ = 0;
  bool last_step_polled_ = false;
  bool copies_wander_ = false;
  std::string failure_;
  Random random_{1};
  void (*entry_)(void*) = nullptr;
  void* context_ = nullptr;
  Order order_ = Order::after;
};

// The block whose thread is running; null between steps.
extern Block* resident;

// Happens-before edges from the host to every thread of a launch, and back. What the host did before
// a launch is in launch_start(0); launch_start(1) is that of the launch before.
char* launch_start(unsigned before);
extern char launch_end_clock;

std::string text(Dim3 d);
std::string text(Site site);

}  // namespace moesaic::emulation
