// The scheduler: which resident block, and which of its threads, runs next.
#include <algorithm>
#include <memory>
#include <mutex>

#include "runtime/block.hpp"
#include "runtime/sanitizers.hpp"

namespace moesaic::emulation {

Position position;

Options& options() {
  static Options values;
  return values;
}

Counters& counters() {
  static Counters values;
  return values;
}

void count_weight_bytes(std::size_t bytes) { counters().weight_bytes += bytes; }

namespace {

char fence_clock;
// Of this launch and of the one before, in turn.
char launch_start_clocks[2];
unsigned launch_turn = 0;

// A way of choosing the next threads of a block, drawn from the seed.
class Schedule {
 public:
  explicit Schedule(uint64_t seed) : seed_(seed), random_(seed + 1) {}

  // Advances `block` a little.
  void advance(Block& block) {
    if (block.ready().empty() || (seed_ && random_.below(64) == 0)) block.revive_polling();
    if (block.ready().empty()) {
      throw Fault("deadlock: no thread of the block can run" + block.waiting_threads());
    }
    if (seed_ % 3 == 2) {
      run_greedily(block);
    } else {
      run_round(block);
    }
  }

  Random& random() { return random_; }

 private:
  // Every ready thread once: in order for seed 0, else in some order.
  void run_round(Block& block) {
    round_.clear();
    round_.swap(block.ready());
    if (seed_) {
      const uint64_t way = random_.below(4);
      if (way == 0) std::reverse(round_.begin(), round_.end());
      if (way > 1) random_.shuffle(round_);
    }
    for (unsigned thread : round_) step(block, thread);
  }

  // One warp runs ahead as far as its barriers let it; the favourite changes now and then.
  void run_greedily(Block& block) {
    constexpr unsigned kSteps = 32;
    for (unsigned i = 0; i < kSteps && !block.ready().empty(); i++) {
      if (priority_.size() != block.warps() || steps_left_-- == 0) {
        priority_.resize(block.warps());
        for (auto& p : priority_) p = random_.next();
        steps_left_ = 64 + random_.below(4096);
      }
      auto& ready = block.ready();
      const auto best = std::max_element(ready.begin(), ready.end(), [&](unsigned a, unsigned b) {
        return priority_[block.warp_of(a)] < priority_[block.warp_of(b)];
      });
      const unsigned thread = *best;
      ready.erase(best);
      step(block, thread);
    }
  }

  void step(Block& block, unsigned thread) {
    block.step(thread);
    if (!block.failure().empty()) throw Fault(block.failure());
    idle_ = block.last_step_polled() ? idle_ + 1 : 0;
    if (idle_ > kIdleRounds * (block.live() + kWarpSize)) {
      throw Fault("livelock: every thread that can run is polling" + block.waiting_threads());
    }
  }

  static constexpr uint64_t kIdleRounds = 256;

  uint64_t seed_;
  Random random_;
  std::vector<unsigned> round_;
  std::vector<uint64_t> priority_;
  uint64_t steps_left_ = 0;
  uint64_t idle_ = 0;
};

// What outlives a launch: mappings are dear, so blocks and places are reused.
struct Machine {
  std::mutex busy;
  PlacePool places;
  std::vector<std::unique_ptr<Block>> blocks;
};

Machine& machine() {
  static Machine instance;
  return instance;
}

class Launch {
 public:
  Launch(Machine& machine, Dim3 grid, Dim3 block, std::size_t dynamic_shared, void (*entry)(void*),
         void* context, Order order)
      : machine_(machine),
        grid_(grid),
        block_(block),
        dynamic_shared_(dynamic_shared),
        entry_(entry),
        context_(context),
        order_of_launch_(order),
        schedule_(options().seed) {
    machine.places.begin_launch();
    slots_ = options().resident_blocks;
    if (slots_ == 0) slots_ = options().seed ? 1 + static_cast<unsigned>(options().seed % 4) : 1;
    slots_ = static_cast<unsigned>(std::min<std::size_t>(slots_, grid.count()));
    while (machine.blocks.size() < slots_) machine.blocks.push_back(std::make_unique<Block>());
    order_.resize(grid.count());
    for (std::size_t i = 0; i < order_.size(); i++) order_[i] = i;
    if (options().seed) schedule_.random().shuffle(order_);
  }

  ~Launch() {
    for (unsigned slot : active_) machine_.blocks[slot]->end(machine_.places);
  }

  void run() {
    for (unsigned slot = 0; slot < slots_; slot++) start_next(slot);
    while (!active_.empty()) {
      const std::size_t pick = schedule_.random().below(active_.size());
      const unsigned slot = active_[pick];
      Block& block = *machine_.blocks[slot];
      schedule_.advance(block);
      if (block.done()) {
        block.end(machine_.places);
        active_.erase(active_.begin() + static_cast<std::ptrdiff_t>(pick));
        start_next(slot);
      }
    }
  }

 private:
  void start_next(unsigned slot) {
    if (next_ == order_.size()) return;
    const std::size_t i = order_[next_++];
    const Dim3 index(static_cast<unsigned>(i % grid_.x),
                     static_cast<unsigned>(i / grid_.x % grid_.y),
                     static_cast<unsigned>(i / grid_.x / grid_.y));
    machine_.blocks[slot]->start(machine_.places, index, block_, grid_, dynamic_shared_,
                                 options().seed, entry_, context_, order_of_launch_);
    active_.push_back(slot);
    counters().threads += block_.count();
  }

  Machine& machine_;
  Dim3 grid_, block_;
  std::size_t dynamic_shared_;
  void (*entry_)(void*);
  void* context_;
  Order order_of_launch_;
  Schedule schedule_;
  unsigned slots_ = 1;
  std::vector<std::size_t> order_;
  std::size_t next_ = 0;
  std::vector<unsigned> active_;
};

}  // namespace

char* launch_start(unsigned before) { return &launch_start_clocks[(launch_turn - before) % 2]; }

void grid_wait() {
  {
    const Unseen unseen;
    resident->grid_wait();
  }
  acquire(launch_start(0));
}

void fence() {
  release(&fence_clock);
  acquire(&fence_clock);
}

void launch(Dim3 grid, Dim3 block, std::size_t dynamic_shared, void (*entry)(void*), void* context,
            Order order) {
  constexpr std::size_t kMaxThreads = 1024;
  if (resident) throw Fault("a kernel launches a kernel");
  if (block.count() == 0 || block.count() > kMaxThreads) {
    throw Fault("a block has 1 to 1024 threads, got " + text(block));
  }
  if (dynamic_shared > options().shared_limit) {
    throw Fault("dynamic shared memory of " + std::to_string(dynamic_shared) + " bytes, at most " +
                std::to_string(options().shared_limit) + " allowed");
  }
  const std::lock_guard lock(machine().busy);
  counters().launches++;
  if (grid.count() == 0) return;
  ++launch_turn;
  release(launch_start(0));
  // Also after a fault.
  const struct Ordered {
    ~Ordered() { acquire(&launch_end_clock); }
  } ordered;
  const Unseen unseen;
  Launch(machine(), grid, block, dynamic_shared, entry, context, order).run();
}

// --- what wrappers call, for the running thread

void fail(const std::string& what, Site site) {
  const Unseen unseen;
  resident->fail(what, site);
}

void warp_collective(uint32_t mask, void* mine, Collective body, Site site) {
  const Unseen unseen;
  resident->warp_collective(mask, mine, body, site);
}
void warp_barrier(uint32_t mask, Site site) {
  const Unseen unseen;
  resident->warp_barrier(mask, site);
}
void block_barrier(Site site) {
  const Unseen unseen;
  resident->block_barrier(site);
}
void yield(Site site) {
  const Unseen unseen;
  resident->yield(site);
}

void* static_shared(const void* key, std::size_t bytes, std::size_t alignment) {
  const Unseen unseen;
  return resident->static_shared(key, bytes, alignment, {});
}
void* dynamic_shared() {
  const Unseen unseen;
  return resident->dynamic_shared();
}
bool is_shared(const void* address, std::size_t bytes) {
  const Unseen unseen;
  return resident->is_shared(address, bytes);
}

void copy_async(void* shared, const void* global, CopyBody body, Site site) {
  const Unseen unseen;
  resident->copy_async({shared, global, body}, site);
}
void copy_commit() {
  const Unseen unseen;
  resident->copy_commit();
}
void copy_wait(unsigned groups_left) {
  const Unseen unseen;
  resident->copy_wait(groups_left);
}

}  // namespace moesaic::emulation
