#pragma once

/// A mutex that forked children can go on with.

#include <mutex>

namespace moesaic {

/// A mutex for short work: a fork waits until nobody holds one of them, so that in the child each is
/// free and what it guards is whole. Whoever holds one takes no mutex of another kind, calls nobody's
/// code but ours, and soon lets go.
class LeafMutex {
 public:
  void lock();
  void unlock() noexcept;

 private:
  std::mutex mutex_;
};

}  // namespace moesaic
