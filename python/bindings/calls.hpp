#pragma once

/// What a call runs with: the tuning and profile of the calling thread's context variables.

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "moesaic/context.hpp"
#include "moesaic/workspace.hpp"

namespace moesaic::python {

/// The innermost tuning(), else the process environment (read here first, with its warnings
/// logged). The reference is valid while the GIL is held and no Python code runs. Throws
/// ConfigError.
const Tuning& current_tuning();
/// The pool of `tuning.threads`.
std::shared_ptr<ThreadPool> shared_pool(const Tuning& tuning);
/// Of the innermost profile(); null outside.
std::shared_ptr<Profiler> current_profiler();

/// A Context for one call, which keeps its profiler alive.
struct Call {
  std::shared_ptr<Profiler> profiler;
  Context context;
  /// `precision` empty: the tuning's own.
  explicit Call(std::optional<Precision> precision = {}, Device device = {});
};

/// "auto" and None leave the choice to the tuning. Throws ConfigError.
std::optional<Precision> parse_precision(const std::optional<std::string>& text,
                                         const char* operation);

/// Workspaces for calls that bring none: as many as calls ran at once, kept for reuse.
class WorkspaceCache {
 public:
  static WorkspaceCache& instance();
  /// At least `bytes` large.
  std::unique_ptr<Workspace> take(std::size_t bytes);
  void give(std::unique_ptr<Workspace> workspace);

 private:
  std::mutex mutex_;
  std::vector<std::unique_ptr<Workspace>> free_;
};

/// The caller's workspace, or one of the cache for the life of this object.
class CallWorkspace {
 public:
  template <class Bytes>
  CallWorkspace(Workspace* given, Bytes&& bytes)
      : given_(given),
        own_(given != nullptr ? nullptr : WorkspaceCache::instance().take(bytes())) {}
  ~CallWorkspace() {
    if (own_) WorkspaceCache::instance().give(std::move(own_));
  }
  CallWorkspace(const CallWorkspace&) = delete;
  CallWorkspace& operator=(const CallWorkspace&) = delete;
  Workspace& operator*() const { return given_ != nullptr ? *given_ : *own_; }

 private:
  Workspace* given_;
  std::unique_ptr<Workspace> own_;
};

}  // namespace moesaic::python
