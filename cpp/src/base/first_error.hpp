#pragma once

/// Errors of work on a thread pool, whose bodies must not throw.

#include <atomic>
#include <exception>
#include <utility>

namespace moesaic {

/// Keeps the first error of many pieces of work; pieces behind it are skipped.
class FirstError {
 public:
  template <class Work>
  void during(Work&& work) noexcept {
    if (failed()) return;
    try {
      work();
    } catch (...) {
      if (!failed_.exchange(true)) error_ = std::current_exception();
    }
  }
  bool failed() const noexcept { return failed_.load(std::memory_order_relaxed); }
  /// Throws it. Call when all work has ended.
  void rethrow() {
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};

}  // namespace moesaic
