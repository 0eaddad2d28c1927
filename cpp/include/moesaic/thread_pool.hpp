#pragma once

/// A small pool for one process. Workers spin briefly, then sleep.

#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

namespace moesaic {

/// CPUs this process may use: the smaller of the affinity mask and the cgroup quota (rounded up),
/// >= 1.
int available_cpus();

class ThreadPool {
 public:
  /// `threads` counts the caller: 1 means no workers. 0 means available_cpus(). A forked child
  /// starts its own workers at its first call. Errors: ConfigError (negative), DeviceError (threads
  /// cannot be started).
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const noexcept;

  /// Calls body(chunk, thread) once for every chunk in [0, chunks), thread in [0, threads()), in
  /// ascending order and with the caller's rounding mode. No allocation. `body` must not throw. A
  /// call never waits for another: it runs on its thread alone, as thread 0, while the workers
  /// serve another caller; a nested call runs inline on the thread index of the outer one. Throws
  /// OperationCancelled, some chunks left out, when the caller's Interrupt is due.
  template <class Body>
  void parallel_for(std::int64_t chunks, Body&& body) {
    using B = std::remove_reference_t<Body>;
    run(
        chunks,
        [](void* b, std::int64_t chunk, int thread) { (*static_cast<B*>(b))(chunk, thread); },
        const_cast<void*>(static_cast<const void*>(std::addressof(body))));
  }

  /// The pool shared by contexts that ask for the same number of threads; 0 asks for what
  /// available_cpus() said at the first such call. The latest one is kept alive.
  static std::shared_ptr<ThreadPool> shared(int threads = 0);

 private:
  using Invoke = void (*)(void* body, std::int64_t chunk, int thread);
  void run(std::int64_t chunks, Invoke invoke, void* body);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moesaic
