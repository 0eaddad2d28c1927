// A GPU of one streaming multiprocessor, in plain C++: each GPU thread is a fiber.
//
// This header is what the CUDA and Metal wrappers are written against, and what a test may set or
// read. It knows 32-lane warps, block barriers, shared memory, asynchronous copies and barriers in
// shared memory; it knows nothing of either language. All of it runs on the calling OS thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>
#include <type_traits>

// Bodies of warp collectives read and write other lanes' stacks while those lanes are stopped. That
// is no memory traffic of the kernel, so the race checker must not see it.
#define MOESAIC_UNCHECKED __attribute__((no_sanitize("thread")))

namespace moesaic::emulation {

struct Dim3 {
  unsigned x, y, z;
  constexpr Dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
  constexpr std::size_t count() const { return std::size_t{x} * y * z; }
};

inline constexpr unsigned kWarpSize = 32;
inline constexpr uint32_t kFullMask = 0xFFFFFFFFu;

// Where the running fiber is; written by the scheduler at each switch.
struct Position {
  Dim3 thread, block, block_size, grid_size;
  unsigned lane, warp;
};
extern Position position;

// What the kernel did wrong. Thrown by launch(); the emulator stays usable.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Options {
  // 0: blocks and threads in order, copies as late as they may land. Other seeds: an order drawn
  // from the seed, several blocks resident at once, copies landing at a random legal moment.
  uint64_t seed = 0;
  // Blocks resident at once; 0 leaves it to the seed (one for seed 0). A kernel whose blocks wait
  // for each other needs all of them.
  unsigned resident_blocks = 0;
  // Dynamic plus static shared memory of a block, bytes.
  std::size_t shared_limit = 227 * 1024;
};
Options& options();

struct Counters {
  uint64_t launches = 0;
  uint64_t threads = 0;
  uint64_t switches = 0;
  uint64_t weight_bytes = 0;  // by load_weight*, cp_async_weight16 and their Metal counterparts
  uint64_t mma = 0;           // warp-level matrix multiplies
};
Counters& counters();
void count_weight_bytes(std::size_t bytes);

// An operation of the kernel and the line that called it.
struct Site {
  const char* operation;
  std::source_location where;
};

// Ends the launch with a Fault that names the thread; called from a fiber.
[[noreturn]] void fail(const std::string& what, Site site);

// --- collectives

// Runs once per warp, on the last lane to arrive. `lanes[i]` is lane i's deposit, null for a lane
// that is not in the mask or has exited.
using Collective = void (*)(void* const* lanes, uint32_t mask);

// All live lanes of `mask` meet here with the same mask, operation and call site. Orders no memory:
// as on a GPU, only warp_barrier does.
void warp_collective(uint32_t mask, void* mine, Collective body, Site site);
void warp_barrier(uint32_t mask, Site site);

// All live threads of the block meet, at one call site.
void block_barrier(Site site);
// Lets others run: the body of every waiting loop.
void yield(Site site);
// Orders this thread's memory with every other thread that fences (release and acquire).
void fence();

// --- shared memory: poisoned with 0xFF, fresh for each block

void* static_shared(const void* key, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();
// Whether the 16 bytes at `address` lie in the running block's shared memory.
bool is_shared(const void* address, std::size_t bytes);

// --- asynchronous copies

// Performs one copy; a function of the kernel's translation unit, so that checkers see its
// accesses.
using CopyBody = void (*)(void* shared, const void* global);
void copy_async(void* shared, const void* global, CopyBody body, Site site);
void copy_commit();
void copy_wait(unsigned groups_left);

// --- barriers in shared memory

void mbarrier_init(uint64_t* barrier, unsigned arrivals, Site site);
void mbarrier_arrive(uint64_t* barrier, Site site);
void mbarrier_arrive_after_copies(uint64_t* barrier, Site site);
void mbarrier_wait(uint64_t* barrier, unsigned parity, Site site);

// --- launching

// How a launch stands to the one before it.
enum class Order {
  after,     // it comes after it
  dependent  // its threads may run before that one has ended: until they call grid_wait nothing that
             // was done since that one began is ordered before them, and all of them must call it
};
void launch(Dim3 grid, Dim3 block, std::size_t dynamic_shared, void (*entry)(void*), void* context,
            Order order = Order::after);
void grid_wait();

template <class Body>
void launch(Dim3 grid, Dim3 block, std::size_t dynamic_shared, Body&& body) {
  launch(
      grid, block, dynamic_shared,
      [](void* context) { (*static_cast<std::remove_reference_t<Body>*>(context))(); }, &body);
}

}  // namespace moesaic::emulation
