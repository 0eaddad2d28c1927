#pragma once

/// What a forked child needs: only the forking thread lives on there, so a mutex that another one
/// held would stay locked for ever, and threads that a destructor joins would never end.

#include <mutex>

namespace moesaic {

/// A mutex that is free in a forked child, with what it guards in a valid state: fork waits for its
/// holder. A holder must take no other one of them, and hold it for a short time.
class LeafMutex : public std::mutex {
 public:
  LeafMutex();
  ~LeafMutex();
};

/// Is told in a forked child, while every LeafMutex is held. A whole object watches: from the end of
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
  void unwatch();
};

}  // namespace moesaic
