#include "metal/host/queue.hpp"

#include <string>

#include "metal/host/errors.hpp"

namespace moesaic::metal {

Queue::Queue(MTL::Device* device) : queue_(NS::TransferPtr(device->newCommandQueue())) {
  require<DeviceError>(queue_.get() != nullptr,
                       [] { return Problem{"metal", "command queue", "one", "none", ""}; });
}

Queue::Recording& Queue::recording() {
  const std::lock_guard lock(mutex_);
  Recording& r = recordings_[std::this_thread::get_id()];
  if (!r.commands) {
    r.commands = NS::RetainPtr(queue_->commandBuffer());
    require<DeviceError>(r.commands.get() != nullptr,
                         [] { return Problem{"metal", "command buffer", "one", "none", ""}; });
    r.encoder = NS::RetainPtr(r.commands->computeCommandEncoder());
  }
  return r;
}

void Queue::dispatch(MTL::ComputePipelineState* pipeline, const DispatchShape& shape,
                     std::span<const std::byte> arguments, std::span<const BufferSlice> buffers,
                     const BufferSlice* grid) {
  require<DeviceError>(shape.threads <= pipeline->maxTotalThreadsPerThreadgroup(), [&] {
    return Problem{"metal", std::string(name_of(shape.kernel)),
                   "at most " + std::to_string(pipeline->maxTotalThreadsPerThreadgroup()) +
                       " threads per threadgroup",
                   std::to_string(shape.threads), ""};
  });
  MTL::ComputeCommandEncoder* const encoder = recording().encoder.get();
  encoder->setComputePipelineState(pipeline);
  encoder->setBytes(arguments.data(), arguments.size(), 0);
  NS::UInteger index = 1;
  for (const BufferSlice& slice : buffers) encoder->setBuffer(slice.buffer, slice.offset, index++);
  const MTL::Size threads = MTL::Size::Make(shape.threads, 1, 1);
  if (grid != nullptr) {
    encoder->dispatchThreadgroups(grid->buffer, grid->offset, threads);
  } else {
    encoder->dispatchThreadgroups(
        MTL::Size::Make(shape.groups[0], shape.groups[1], shape.groups[2]), threads);
  }
}

void Queue::submit() {
  const std::lock_guard lock(mutex_);
  const auto found = recordings_.find(std::this_thread::get_id());
  if (found == recordings_.end()) return;
  found->second.encoder->endEncoding();
  found->second.commands->commit();
  // What is done and went well needs no wait.
  std::erase_if(submitted_, [](const Submitted& one) {
    return one.commands->status() == MTL::CommandBufferStatusCompleted;
  });
  submitted_.push_back({found->first, found->second.commands});
  recordings_.erase(found);
}

void Queue::abandon() noexcept {
  const std::lock_guard lock(mutex_);
  const auto found = recordings_.find(std::this_thread::get_id());
  if (found == recordings_.end()) return;
  found->second.encoder->endEncoding();
  recordings_.erase(found);
}

void Queue::wait() {
  submit();
  std::vector<Submitted> waiting;
  {
    const std::lock_guard lock(mutex_);
    waiting = submitted_;
  }
  for (const Submitted& one : waiting) one.commands->waitUntilCompleted();
  NS::SharedPtr<MTL::CommandBuffer> failed;
  {
    const std::lock_guard lock(mutex_);
    std::erase_if(submitted_, [&](const Submitted& one) {
      const auto status = one.commands->status();
      if (status == MTL::CommandBufferStatusCompleted) return true;
      if (status != MTL::CommandBufferStatusError || one.by != std::this_thread::get_id()) {
        return false;
      }
      if (!failed) failed = one.commands;
      return true;
    });
  }
  const AutoreleaseScope scope;
  if (failed) throw_command_error(failed->error());
}

}  // namespace moesaic::metal
