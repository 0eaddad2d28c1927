#pragma once

/// What one operation needs in the memory of its backend: scratch, and the host's plans, dispatch
/// lists and routings where the kernels can read them.

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "moesaic/backend.hpp"
#include "moesaic/context.hpp"

namespace moesaic::ops {

/// Throws CaptureError while the context's stream records a graph, whose replays would read memory
/// that is gone by then. `what` needs that memory.
void require_no_capture(const char* operation, const Context& context, const char* what);

/// Take and upload everything before the first launch, so that a CaptureError leaves nothing
/// launched; call finish() behind the last one. Host arrays must live until then.
class CallMemory {
 public:
  CallMemory(const char* operation, Context& context);
  /// After an error, which is the one that counts, it waits for what was launched; what then fails
  /// on the device is kept for the next call of the context.
  ~CallMemory();
  CallMemory(const CallMemory&) = delete;
  CallMemory& operator=(const CallMemory&) = delete;

  /// Not initialised; null for no bytes. Errors: CaptureError, OutOfMemoryError.
  std::byte* take(std::size_t bytes);
  float* take_floats(std::int64_t count);

  // The host's arrays as the backend reads them: the same on a backend of host memory, else copies
  // in the order of the stream. Errors as `take`.
  const std::int32_t* on_device(std::span<const std::int32_t> ids);
  RoutingView on_device(const Routing& routing);
  /// `entries`: elements of `source` and `destination`.
  RowMap on_device(const RowMap& map, std::int64_t entries);

  /// Hands the launches to the device; where there is memory to free it waits for them first. Errors:
  /// those of the device.
  void finish();

 private:
  struct Block {
    void* memory;
    std::size_t bytes;
  };
  using Bytes = std::span<const std::byte>;
  std::byte* allocate(std::size_t bytes, const char* what);
  void settle();
  /// Where each array lies in a block of all; null for arrays without bytes.
  std::vector<const std::byte*> upload(std::initializer_list<Bytes> arrays);

  const char* operation_;
  Context& context_;
  const Backend& backend_;
  bool reads_host_;
  std::vector<Block> blocks_;
  bool finished_ = false;
};

}  // namespace moesaic::ops
