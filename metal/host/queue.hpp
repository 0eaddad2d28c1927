#pragma once

/// Recording and running commands. Each context records into a command buffer of its own until it
/// submits; all buffers run in order of submission. The lock guards the list alone: no message goes
/// to the driver under it, so whoever waits for the device keeps nobody from submitting.

#include <cstddef>
#include <memory>
#include <span>
#include <thread>
#include <vector>

#include "metal/dispatch_shape.hpp"
#include "metal/host/memory.hpp"
#include "metal/host/pipelines.hpp"
#include "moesaic/context.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic::metal {

/// Everything that was submitted and is not known to have ended well.
struct Submissions;

/// What one context has recorded, for one thread at a time, as contexts are. Its end forgets the
/// recording, and leaves what failed to the next Queue::wait_for_all.
class Work {
 public:
  explicit Work(std::shared_ptr<Submissions> submissions);
  ~Work();
  Work(const Work&) = delete;
  Work& operator=(const Work&) = delete;

  /// How long the GPU ran what was waited for here, in seconds.
  double gpu_seconds() const { return gpu_seconds_; }

 private:
  friend class Queue;
  void abandon() noexcept;

  std::shared_ptr<Submissions> submissions_;
  std::thread::id thread_;  ///< that used it last
  double gpu_seconds_ = 0;
  NS::SharedPtr<MTL::CommandBuffer> commands_;
  NS::SharedPtr<MTL::ComputeCommandEncoder> encoder_;
};

/// Work::gpu_seconds of a context of this backend.
double gpu_seconds(Context& context);

class Queue {
 public:
  explicit Queue(MTL::Device* device);

  /// The work of a context, which begins with its first use.
  Work& work_of(Context& context) const;

  /// Appends a dispatch to the recording. `arguments` are copied; `buffers` are bound from index 1
  /// on; with `grid` the number of threadgroups is read there when it runs. The first of a recording
  /// waits while as many command buffers are under way as the driver allows (64).
  void dispatch(Work& work, MTL::ComputePipelineState* pipeline, const DispatchShape& shape,
                std::span<const std::byte> arguments, std::span<const BufferSlice> buffers,
                const BufferSlice* grid = nullptr);
  /// Hands the recording to the device.
  void submit(Work& work);
  /// Forgets the recording.
  void abandon(Work& work) noexcept { work.abandon(); }
  /// Submits, waits for everything that this work submitted, and throws the first error of it that
  /// was not thrown yet: OutOfMemoryError or DeviceError.
  void wait(Work& work);
  /// Submits what the calling thread has recorded and waits for everything of every context. Throws
  /// the first error of work that the calling thread used last, or whose context has gone: those of
  /// others wait for their owners.
  void wait_for_all();

 private:
  NS::SharedPtr<MTL::CommandQueue> queue_;
  std::shared_ptr<Submissions> submissions_;
};

}  // namespace moesaic::metal
