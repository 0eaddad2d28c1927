#pragma once

/// Zones and counters of the forward. Without a profiler a zone costs one branch.

#include <array>
#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/leaf_mutex.hpp"
#include "moesaic/names.hpp"

namespace moesaic {

class Context;

/// The steps of a forward in order (cpp/README.md), and the copies between host and device or
/// between slow and fast memory.
// clang-format off
enum class Zone : std::uint8_t {
  Sync,      ///< earlier work of the stream; where the profiler waits
  Router,    ///< logits from x
  Download,  ///< logits to the host, where routing runs there although the layer is on a device
  Route, Plan, Align, Gather, GateUp, Activate, Down, Combine, Shared,
  Upload,    ///< a routing to the device, or experts into the slots of a pool
  Count,
};
/// Sums over the forwards. What lies in device memory is not read back for them.
enum class Counter : std::uint8_t {
  Calls, Tokens, Pairs,
  PaddedRows,      ///< rows that only fill blocks; on the CPU
  ExpertsTouched,  ///< routed experts with at least one pair; on the CPU
  WeightBytes,     ///< of the experts touched, the shared ones and the projections; on the CPU
  NonfiniteRows,   ///< of logits; on the CPU, on Metal, and on CUDA under `strict`
  Count,
};
// clang-format on

struct ZoneTotal {
  std::int64_t calls = 0;
  std::int64_t nanoseconds = 0;
};

/// Collects while it is attached to a Context. Thread safe.
class Profiler {
 public:
  struct Event {
    Zone zone;
    std::int64_t begin_ns, end_ns;  ///< since the profiler was made
    std::uint64_t thread;
  };

  /// Launches return before a device is done: `waits` makes every zone of a forward end when it is,
  /// which costs their overlap.
  explicit Profiler(bool keep_events = false, bool waits = false);
  bool waits() const { return waits_; }
  ZoneTotal zone(Zone z) const;
  std::int64_t counter(Counter c) const;
  void add(Zone z, std::chrono::steady_clock::time_point begin,
           std::chrono::steady_clock::time_point end);
  void add(Counter c, std::int64_t amount);
  void reset();
  std::vector<Event> events() const;
  /// The events as Chrome trace-event JSON, for chrome://tracing or Perfetto.
  std::string chrome_trace() const;

 private:
  mutable LeafMutex mutex_;
  std::chrono::steady_clock::time_point start_;
  bool keep_events_, waits_;
  std::array<ZoneTotal, static_cast<std::size_t>(Zone::Count)> zones_{};
  std::array<std::int64_t, static_cast<std::size_t>(Counter::Count)> counters_{};
  std::vector<Event> events_;
};

/// Times its scope when a profiler is given.
class ScopedZone {
 public:
  ScopedZone(Profiler* profiler, Zone zone) : profiler_(profiler), zone_(zone) {
    if (profiler_ != nullptr) begin_ = std::chrono::steady_clock::now();
  }
  /// Uses the context's profiler. Where that one waits, the end of the zone waits for the context's
  /// stream, unless the stream records a graph.
  ScopedZone(Context& context, Zone zone);
  ~ScopedZone() {
    if (profiler_ == nullptr) return;
    if (context_ != nullptr) wait();
    profiler_->add(zone_, begin_, std::chrono::steady_clock::now());
  }
  ScopedZone(const ScopedZone&) = delete;
  ScopedZone& operator=(const ScopedZone&) = delete;

 private:
  void wait() const noexcept;

  Profiler* profiler_;
  Context* context_ = nullptr;  ///< not null: its stream is waited for
  Zone zone_;
  std::chrono::steady_clock::time_point begin_;
};

}  // namespace moesaic
