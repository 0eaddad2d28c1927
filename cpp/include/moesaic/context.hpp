#pragma once

/// What a call runs with: backend, threads, tuning, profiler. Several may live at once; none is
/// global.

#include <memory>

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

 private:
  const Backend* backend_;
  Tuning tuning_;
  std::shared_ptr<ThreadPool> pool_;
  Profiler* profiler_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace moesaic
