// A stack that can be switched to, with the notes that ASan and TSan need at each switch.
#pragma once

#include <cstddef>
#include <deque>
#include <vector>

namespace moesaic::emulation {

// Where a fiber runs: its stack, and the thread that TSan takes it for (null without TSan).
struct Place {
  char* stack = nullptr;
  void* checker = nullptr;
};

// Places are dear, so they outlive the launch that made them. To TSan a place that is used again is
// the thread it was before: right two launches later, which come after this one, and wrong in a
// later block of the same launch, which is ordered with nothing, and in the next launch, which may
// be a dependent one.
class PlacePool {
 public:
  static constexpr std::size_t kStackBytes = 256 * 1024;

  PlacePool() = default;
  PlacePool(const PlacePool&) = delete;
  PlacePool& operator=(const PlacePool&) = delete;
  ~PlacePool();

  void begin_launch();
  Place take();
  void give_back(Place place);

 private:
  Place make();

  std::vector<Place> clean_;
  std::deque<Place> resting_;  // used by the launch before
  std::deque<Place> used_;     // by fibers of this launch that are done
  std::size_t made_ = 0;
};

class Fiber {
 public:
  // Prepares `entry(argument)` to run at the first resume(). `colour` staggers the tops of stacks,
  // which would otherwise share cache sets.
  void start(Place place, std::size_t colour, void (*entry)(void*), void* argument);
  // Runs the fiber until it suspends or finishes; called by the scheduler.
  void resume();
  // Back to the scheduler; called on the fiber.
  void suspend();
  // As suspend(), for the last time.
  [[noreturn]] void finish();
  // The place is free again, whether the fiber has finished or is abandoned; all it did is ordered
  // before whoever acquires `clock`.
  Place retire(void* clock);

 private:
  static void enter(void* self);
  void leave(bool for_good);

  void* stack_pointer_ = nullptr;
  void* scheduler_pointer_ = nullptr;
  Place place_;
  void (*entry_)(void*) = nullptr;
  void* argument_ = nullptr;
  // ASan: the fake stack and where the scheduler's stack lies.
  void* own_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  std::size_t scheduler_stack_bytes_ = 0;
  // TSan: the scheduler's thread.
  void* scheduler_checker_ = nullptr;
};

}  // namespace moesaic::emulation
