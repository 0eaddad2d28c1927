#pragma once

/// What a call runs with: the tuning and profile of the calling thread's context variables.

#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "moesaic/context.hpp"
#include "moesaic/workspace.hpp"

namespace moesaic::python {

/// The innermost tuning(), else the process environment (read here first, with its warnings
/// logged). The reference is valid while the GIL is held and no Python code runs. Throws
/// ConfigError.
const Tuning& current_tuning();
/// The pool of `tuning.threads` threads, which all calls share.
std::shared_ptr<ThreadPool> shared_pool(const Tuning& tuning);
/// The profiler of the innermost profile(); null outside of any.
std::shared_ptr<Profiler> current_profiler();

/// A Context for one call, which keeps its profiler alive.
struct Call {
  std::shared_ptr<Profiler> profiler;
  Context context;
  /// Without a `precision` the tuning's own holds.
  explicit Call(std::optional<Precision> precision = {}, Device device = {});
};

/// "auto" and None leave the choice to the tuning. Throws ConfigError.
std::optional<Precision> parse_precision(const std::optional<std::string>& text,
                                         const char* operation);

/// Workspaces for calls that bring none: as many as calls ran at once, kept for reuse. Launches may
/// still run when a call is back, so on a GPU each stream has its own.
class WorkspaceCache {
 public:
  static WorkspaceCache& instance();
  /// At least `bytes` large, in the memory of the context's backend. Throws CaptureError while its
  /// stream records a graph, whose replays would need the memory later.
  std::unique_ptr<Workspace> take(const Context& context, std::size_t bytes);
  void give(const Context& context, std::unique_ptr<Workspace> workspace);

 private:
  using Key = std::pair<const Backend*, void*>;
  static Key key_of(const Context& context) { return {&context.backend(), context.stream()}; }
  std::mutex mutex_;
  std::map<Key, std::vector<std::unique_ptr<Workspace>>> free_;
};

/// The caller's workspace, or one of the cache for the life of this object.
class CallWorkspace {
 public:
  template <class Bytes>
  CallWorkspace(Workspace* given, const Context& context, Bytes&& bytes)
      : context_(context),
        given_(given),
        own_(given != nullptr ? nullptr : WorkspaceCache::instance().take(context, bytes())) {}
  ~CallWorkspace() {
    if (own_) WorkspaceCache::instance().give(context_, std::move(own_));
  }
  CallWorkspace(const CallWorkspace&) = delete;
  CallWorkspace& operator=(const CallWorkspace&) = delete;
  Workspace& operator*() const { return given_ != nullptr ? *given_ : *own_; }

 private:
  const Context& context_;
  Workspace* given_;
  std::unique_ptr<Workspace> own_;
};

}  // namespace moesaic::python
