#include "base/fork.hpp"

#include <pthread.h>

#include <atomic>
#include <climits>
#include <cstdint>

#include "base/futex.hpp"

namespace moesaic {
namespace {

/// How many threads hold a LeafMutex or wait for one, and in the top bit whether a thread forks, for
/// which newcomers wait. Holders may take a second one meanwhile, hence the count of each thread.
class ForkGate {
 public:
  void enter() noexcept {
    if (depth_++ > 0) return;
    std::uint32_t seen = state_.load(std::memory_order_relaxed);
    for (;;) {
      if ((seen & kForks) != 0) {
        futex_wait(state_, seen);
        seen = state_.load(std::memory_order_relaxed);
      } else if (state_.compare_exchange_weak(seen, seen + 1, std::memory_order_acquire,
                                              std::memory_order_relaxed)) {
        return;
      }
    }
  }

  void leave() noexcept {
    if (--depth_ > 0) return;
    if (state_.fetch_sub(1, std::memory_order_release) == (kForks | 1)) {
      futex_wake(state_, INT_MAX);
    }
  }

  void close() noexcept {
    while ((state_.fetch_or(kForks, std::memory_order_relaxed) & kForks) != 0) {
      futex_wait(state_, state_.load(std::memory_order_relaxed) | kForks);  // for another fork
    }
    std::uint32_t seen = state_.load(std::memory_order_acquire);
    while (seen != kForks) {
      futex_wait(state_, seen);
      seen = state_.load(std::memory_order_acquire);
    }
  }

  void open() noexcept {
    state_.store(0, std::memory_order_release);
    futex_wake(state_, INT_MAX);
  }

 private:
  static constexpr std::uint32_t kForks = 0x80000000U;
  static thread_local int depth_;
  std::atomic<std::uint32_t> state_{0};
};

constinit thread_local int ForkGate::depth_ = 0;
/// Never destroyed, since objects in static memory may outlive it; nothing of it needs to be.
constinit ForkGate gate;

}  // namespace

struct ForkHooks {
  LeafMutex mutex;
  ForkHook* first = nullptr;

  void add(ForkHook* hook) {
    const std::lock_guard lock(mutex);
    hook->watches_ = true;
    hook->next_ = first;
    if (first != nullptr) first->previous_ = hook;
    first = hook;
  }
  void remove(ForkHook* hook) noexcept {
    if (!hook->watches_) return;  // its making failed before it was whole
    const std::lock_guard lock(mutex);
    (hook->previous_ != nullptr ? hook->previous_->next_ : first) = hook->next_;
    if (hook->next_ != nullptr) hook->next_->previous_ = hook->previous_;
  }
  void tell() noexcept {
    for (ForkHook* hook = first; hook != nullptr; hook = hook->next_) hook->forked();
  }
};

namespace {

constinit ForkHooks hooks;

/// The one handler of the library.
[[maybe_unused]] const int watched = pthread_atfork([] { gate.close(); }, [] { gate.open(); },
                                                    [] {
                                                      hooks.tell();
                                                      gate.open();
                                                    });

}  // namespace

void LeafMutex::lock() {
  gate.enter();
  mutex_.lock();
}

void LeafMutex::unlock() noexcept {
  mutex_.unlock();
  gate.leave();
}

void ForkHook::watch() { hooks.add(this); }
void ForkHook::unwatch() noexcept { hooks.remove(this); }

}  // namespace moesaic
