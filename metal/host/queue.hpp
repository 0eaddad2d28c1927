#pragma once

/// Recording and running commands. A thread records into a command buffer of its own until it
/// submits; all buffers run in order of submission.

#include <cstddef>
#include <map>
#include <span>
#include <thread>
#include <vector>

#include "metal/dispatch_shape.hpp"
#include "metal/host/memory.hpp"
#include "metal/host/pipelines.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic::metal {

class Queue {
 public:
  explicit Queue(MTL::Device* device);

  /// Appends a dispatch to the calling thread's recording. `arguments` are copied; `buffers` are
  /// bound from index 1 on; with `grid` the number of threadgroups is read there when it runs.
  void dispatch(MTL::ComputePipelineState* pipeline, const DispatchShape& shape,
                std::span<const std::byte> arguments, std::span<const BufferSlice> buffers,
                const BufferSlice* grid = nullptr);
  /// Hands the calling thread's recording to the device.
  void submit();
  /// Forgets the calling thread's recording.
  void abandon() noexcept;
  /// Submits, waits for everything submitted, and throws the first error of what the calling thread
  /// submitted since it last waited: those of other threads wait for them.
  void wait();

 private:
  struct Recording {
    NS::SharedPtr<MTL::CommandBuffer> commands;
    NS::SharedPtr<MTL::ComputeCommandEncoder> encoder;
  };
  Recording& recording();

  NS::SharedPtr<MTL::CommandQueue> queue_;
  LeafMutex mutex_;
  std::map<std::thread::id, Recording> recordings_;
  struct Submitted {
    std::thread::id by;
    NS::SharedPtr<MTL::CommandBuffer> commands;
  };
  std::vector<Submitted> submitted_;
};

}  // namespace moesaic::metal
