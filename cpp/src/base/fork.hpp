#pragma once

/// What a forked child needs: only the forking thread lives on there, so a mutex that another one
/// held would stay locked for ever, and threads that a destructor joins would never end. Mutexes for
/// short work are each a LeafMutex. What is held for long is made anew by a ForkHook, and what it
/// guards is changed under a LeafMutex, so that the child finds it whole.

#include <memory>

#include "moesaic/leaf_mutex.hpp"

namespace moesaic {

/// Is told in a forked child, while nobody holds a LeafMutex. A whole object watches: from the end of
/// its constructor to the beginning of its destructor.
class ForkHook {
 public:
  ForkHook() = default;
  virtual ~ForkHook() = default;
  ForkHook(const ForkHook&) = delete;
  ForkHook& operator=(const ForkHook&) = delete;

  virtual void forked() noexcept = 0;

 protected:
  void watch();
  void unwatch() noexcept;
  /// Makes a mutex anew whose holders the child lacks; destroying a held one is undefined.
  template <class Mutex>
  static void renew(Mutex& mutex) noexcept {
    std::construct_at(&mutex);
  }

 private:
  friend struct ForkHooks;
  ForkHook* previous_ = nullptr;
  ForkHook* next_ = nullptr;
  bool watches_ = false;
};

}  // namespace moesaic
