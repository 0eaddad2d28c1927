#include "base/fork.hpp"

#include <pthread.h>

#include <vector>

namespace moesaic {
namespace {

/// Never destroyed, since objects in static memory may outlive it.
struct Known {
  std::mutex mutex;
  std::vector<LeafMutex*> mutexes;
  std::vector<ForkHook*> hooks;

  static Known& get() {
    static Known& known = *[] {
      auto* made = new Known;
      pthread_atfork([] { get().lock(); }, [] { get().unlock(); },
                     [] {
                       for (ForkHook* hook : get().hooks) hook->forked();
                       get().unlock();
                     });
      return made;
    }();
    return known;
  }

  void lock() {
    mutex.lock();
    for (LeafMutex* one : mutexes) one->lock();
  }
  void unlock() {
    for (LeafMutex* one : mutexes) one->unlock();
    mutex.unlock();
  }
};

template <class T>
void add(std::vector<T*> Known::* list, T* one) {
  Known& known = Known::get();
  const std::lock_guard lock(known.mutex);
  (known.*list).push_back(one);
}

template <class T>
void remove(std::vector<T*> Known::* list, T* one) {
  Known& known = Known::get();
  const std::lock_guard lock(known.mutex);
  std::erase(known.*list, one);
}

}  // namespace

LeafMutex::LeafMutex() { add(&Known::mutexes, this); }
LeafMutex::~LeafMutex() { remove(&Known::mutexes, this); }
void ForkHook::watch() { add(&Known::hooks, this); }
void ForkHook::unwatch() { remove(&Known::hooks, this); }

}  // namespace moesaic
