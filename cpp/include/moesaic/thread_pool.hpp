#pragma once

/// A small pool for one process. Workers spin briefly, then sleep. Where a pool tells NUMA nodes
/// apart, each worker stays on the CPUs of one.

#include <chrono>
#include <cstdint>
#include <memory>
#include <type_traits>
#include <utility>

#include "moesaic/topology.hpp"

namespace moesaic {

/// CPUs this process may use: the smaller of the affinity mask and the cgroup quota (rounded up),
/// >= 1.
int available_cpus();
/// Threads that a pool has when none are asked for: one for each physical core that this process may
/// use, no more than available_cpus(). Two threads of one core share what products are made of.
int default_threads();

class ThreadPool {
 public:
  /// `threads` counts the caller: 1 means no workers. 0 means default_threads(). A forked child
  /// starts its own workers at its first call. Errors: ConfigError (negative), DeviceError (threads
  /// cannot be started).
  explicit ThreadPool(int threads = 0);
  /// Threads are shared out to the nodes of `topology` in proportion to their cores. One that has
  /// had nothing to do for `patience` helps another node, whose memory it reads more slowly; never,
  /// when that is longer than threads stay awake (40 us).
  ThreadPool(int threads, const Topology& topology, std::chrono::microseconds patience = kPatience);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const noexcept;
  const Topology& topology() const noexcept;
  int nodes() const noexcept;  ///< of the topology

  /// Calls body(chunk, thread) once for every chunk in [0, chunks), thread in [0, threads()), and
  /// with the caller's rounding mode. Chunks start roughly in ascending order. No allocation. `body`
  /// must not throw. A call never waits for another: it runs on its thread alone, as thread 0, while
  /// the workers serve another caller; a nested call runs inline on the thread index of the outer
  /// one. Throws OperationCancelled, some chunks left out, when the caller's Interrupt is due.
  template <class Body>
  void parallel_for(std::int64_t chunks, Body&& body) {
    run(chunks, 0, invoke_of(body), address_of(body));
  }

  /// As parallel_for of nodes() * per_node chunks, of which node n's threads take those from
  /// n * per_node on, and threads of other nodes only what these do not come to.
  template <class Body>
  void parallel_for_nodes(std::int64_t per_node, Body&& body) {
    run(0, per_node, invoke_of(body), address_of(body));
  }

  /// The pool shared by contexts that ask for the same number of threads and of nodes; 0 threads
  /// asks for what default_threads() said at the first such call, `nodes` is as for
  /// machine_topology. The latest one is kept alive.
  static std::shared_ptr<ThreadPool> shared(int threads = 0, std::int32_t nodes = 0);

  /// Lets pools of one node work on threads of the OpenMP runtime that a loaded library depends on,
  /// in calls from threads for which the runtime has as many as the pool. Threads of both spin for
  /// work, and would keep each other from the CPUs; now the pool's own sleep. Returns whether there
  /// is such a runtime: not where the library is not loaded, nor where its threads cannot be had by
  /// the names of GCC's runtime, which LLVM's and Intel's have too. It is never unloaded then. A
  /// forked child, in which the runtime has lost its threads, uses the pools' own.
  static bool borrow_openmp(const char* library);

 private:
  static constexpr std::chrono::microseconds kPatience{20};  // about what a job costs more there
  using Invoke = void (*)(void* body, std::int64_t chunk, int thread);
  template <class Body>
  static Invoke invoke_of(Body&) {
    return [](void* b, std::int64_t chunk, int thread) {
      (*static_cast<std::remove_reference_t<Body>*>(b))(chunk, thread);
    };
  }
  template <class Body>
  static void* address_of(Body& body) {
    return const_cast<void*>(static_cast<const void*>(std::addressof(body)));
  }
  /// `chunks` for anyone, or `per_node` for each node.
  void run(std::int64_t chunks, std::int64_t per_node, Invoke invoke, void* body);
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace moesaic
