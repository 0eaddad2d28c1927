#pragma once

/// What a call runs with: backend, threads, tuning, profiler. Several may live at once; none is
/// global.

#include <exception>
#include <memory>
#include <utility>

#include "moesaic/backend.hpp"
#include "moesaic/profile.hpp"
#include "moesaic/thread_pool.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic {

class Context {
 public:
  /// Uses the shared pool of `tuning.threads`. Errors: DeviceError when the backend is absent.
  explicit Context(Device device = {}, const Tuning& tuning = Tuning::process());
  Context(const Backend& backend, const Tuning& tuning, std::shared_ptr<ThreadPool> pool);

  const Backend& backend() const { return *backend_; }
  const Tuning& tuning() const { return tuning_; }
  ThreadPool& pool() const { return *pool_; }
  Profiler* profiler() const { return profiler_; }
  void attach(Profiler* profiler) { profiler_ = profiler; }  ///< null detaches
  void* stream() const { return stream_; }
  void set_stream(void* stream) { stream_ = stream; }
  /// What the backend keeps for this context, such as work that is recorded or on its way; copies of
  /// the context share it, and it ends with the last of them. Null until the backend sets it.
  std::shared_ptr<void>& backend_state() { return backend_state_; }
  /// Keeps the first error that was seen where nothing may be thrown, for throw_kept_error() at the
  /// end of the call.
  void keep_error(std::exception_ptr error) noexcept {
    if (error_ == nullptr) error_ = std::move(error);
  }
  void throw_kept_error() {
    if (error_ != nullptr) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  const Backend* backend_;
  Tuning tuning_;
  std::shared_ptr<ThreadPool> pool_;
  Profiler* profiler_ = nullptr;
  void* stream_ = nullptr;
  std::shared_ptr<void> backend_state_;
  std::exception_ptr error_;
};

}  // namespace moesaic
