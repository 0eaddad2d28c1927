#pragma once

/// What a call runs with: the tuning and profile of the calling thread's context variables.

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "moesaic/context.hpp"
#include "moesaic/leaf_mutex.hpp"
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
/// still run when a call is back, so on a GPU each stream has its own. One that is larger than
/// needed for some calls in a row is let go, so that one large batch is not paid for ever after.
class WorkspaceCache {
 public:
  struct Kept {
    std::unique_ptr<Workspace> workspace;
    std::size_t needed = 0;  ///< by the call that has it, or had it last
    int idle_calls = 0;      ///< calls in a row that needed less than half of it, or not it
  };

  static WorkspaceCache& instance();
  /// At least `bytes` large, in the memory of the context's backend. Throws CaptureError while its
  /// stream records a graph, whose replays would need the memory later.
  Kept take(const Context& context, std::size_t bytes);
  void give(const Context& context, Kept kept) noexcept;
  /// Lets go of all that no call uses; returns their bytes.
  std::size_t trim();

 private:
  static constexpr int kIdleCalls = 16;
  using Key = std::pair<const Backend*, void*>;
  static Key key_of(const Context& context) { return {&context.backend(), context.stream()}; }
  LeafMutex mutex_;
  std::map<Key, std::vector<Kept>> free_;
};

/// The caller's workspace, or one of the cache for the life of this object.
class CallWorkspace {
 public:
  template <class Bytes>
  CallWorkspace(Workspace* given, const Context& context, Bytes&& bytes)
      : context_(context),
        given_(given),
        own_(given != nullptr ? WorkspaceCache::Kept{}
                              : WorkspaceCache::instance().take(context, bytes())) {}
  ~CallWorkspace() {
    if (own_.workspace) WorkspaceCache::instance().give(context_, std::move(own_));
  }
  CallWorkspace(const CallWorkspace&) = delete;
  CallWorkspace& operator=(const CallWorkspace&) = delete;
  Workspace& operator*() const { return given_ != nullptr ? *given_ : *own_.workspace; }

 private:
  const Context& context_;
  Workspace* given_;
  WorkspaceCache::Kept own_;
};

}  // namespace moesaic::python
