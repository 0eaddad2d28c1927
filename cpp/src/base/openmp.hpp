#pragma once

/// An OpenMP runtime that another library has brought into the process, and whose threads pools
/// borrow.

namespace moesaic {

/// Functions of the runtime, by their names in its library.
struct OpenMpRuntime {
  /// GOMP_parallel: calls member(data) on each thread, the caller's too, and waits for all.
  void (*parallel)(void (*member)(void* data), void* data, unsigned threads, unsigned flags);
  int (*thread_num)();   ///< omp_get_thread_num
  int (*max_threads)();  ///< omp_get_max_threads, of the calling thread
  int (*in_parallel)();  ///< omp_in_parallel
};

/// Makes the runtime that a loaded library depends on the one to borrow from; whether it has one.
bool lend_openmp(const char* library);

/// The runtime to borrow from; null: none, as in every forked child, in which it has lost its
/// threads and would wait for them.
const OpenMpRuntime* openmp_lender() noexcept;

}  // namespace moesaic
