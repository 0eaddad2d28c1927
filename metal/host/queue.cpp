#include "metal/host/queue.hpp"

#include <algorithm>
#include <string>
#include <utility>

#include "metal/host/errors.hpp"

namespace moesaic::metal {
namespace {

using Commands = NS::SharedPtr<MTL::CommandBuffer>;

struct Submitted {
  const Work* by;  ///< null once its context has gone
  std::thread::id thread;
  Commands commands;
};

bool completed(const Submitted& one) {
  return one.commands->status() == MTL::CommandBufferStatusCompleted;
}

}  // namespace

struct Submissions {
  LeafMutex mutex;
  std::vector<Submitted> list;
  std::vector<std::weak_ptr<Work>> works;

  std::vector<Submitted> all() {
    const std::lock_guard lock(mutex);
    return list;
  }
  std::vector<Submitted> of(const Work& work) {
    std::vector<Submitted> own = all();
    std::erase_if(own, [&](const Submitted& one) { return one.by != &work; });
    return own;
  }
  void remove(std::span<const Submitted> ended) {
    const std::lock_guard lock(mutex);
    std::erase_if(list, [&](const Submitted& one) {
      return std::ranges::any_of(ended, [&](const Submitted& other) {
        return other.commands.get() == one.commands.get();
      });
    });
  }
};

Work::Work(std::shared_ptr<Submissions> submissions) : submissions_(std::move(submissions)) {}

Work::~Work() {
  {
    const std::lock_guard lock(submissions_->mutex);
    for (Submitted& one : submissions_->list) {
      if (one.by == this) one.by = nullptr;
    }
  }
  abandon();
}

void Work::abandon() noexcept {
  if (!commands_) return;
  const AutoreleaseScope scope;
  encoder_->endEncoding();
  encoder_ = {};
  commands_ = {};
}

double gpu_seconds(Context& context) {
  const auto* const work = static_cast<const Work*>(context.backend_state().get());
  return work != nullptr ? work->gpu_seconds() : 0;
}

Queue::Queue(MTL::Device* device)
    : queue_(NS::TransferPtr(device->newCommandQueue())),
      submissions_(std::make_shared<Submissions>()) {
  require<DeviceError>(queue_.get() != nullptr,
                       [] { return Problem{"metal", "command queue", "one", "none", ""}; });
}

Work& Queue::work_of(Context& context) const {
  std::shared_ptr<void>& state = context.backend_state();
  const auto self = std::this_thread::get_id();
  if (state == nullptr) {
    const auto work = std::make_shared<Work>(submissions_);
    work->thread_ = self;
    const std::lock_guard lock(submissions_->mutex);
    std::erase_if(submissions_->works, [](const auto& one) { return one.expired(); });
    submissions_->works.push_back(work);
    state = work;
  }
  Work& work = *static_cast<Work*>(state.get());
  if (work.thread_ != self) {
    const std::lock_guard lock(submissions_->mutex);
    work.thread_ = self;
  }
  return work;
}

void Queue::dispatch(Work& work, MTL::ComputePipelineState* pipeline, const DispatchShape& shape,
                     std::span<const std::byte> arguments, std::span<const BufferSlice> buffers,
                     const BufferSlice* grid) {
  require<DeviceError>(shape.threads <= pipeline->maxTotalThreadsPerThreadgroup(), [&] {
    return Problem{"metal", std::string(name_of(shape.kernel)),
                   "at most " + std::to_string(pipeline->maxTotalThreadsPerThreadgroup()) +
                       " threads per threadgroup",
                   std::to_string(shape.threads), ""};
  });
  if (!work.commands_) {
    Commands commands = NS::RetainPtr(queue_->commandBuffer());
    require<DeviceError>(commands.get() != nullptr,
                         [] { return Problem{"metal", "command buffer", "one", "none", ""}; });
    work.encoder_ = NS::RetainPtr(commands->computeCommandEncoder());
    work.commands_ = std::move(commands);
  }
  MTL::ComputeCommandEncoder* const encoder = work.encoder_.get();
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

void Queue::submit(Work& work) {
  if (!work.commands_) return;
  // What is done and went well needs no wait; of what failed behind contexts that have gone, one
  // error is enough.
  std::vector<Submitted> ended;
  bool failed = false;
  for (Submitted& one : submissions_->all()) {
    const bool gone = one.by == nullptr && one.commands->status() == MTL::CommandBufferStatusError;
    if (completed(one) || (gone && std::exchange(failed, true))) ended.push_back(std::move(one));
  }
  submissions_->remove(ended);
  work.encoder_->endEncoding();
  work.commands_->commit();
  work.encoder_ = {};
  const std::lock_guard lock(submissions_->mutex);
  submissions_->list.push_back({&work, work.thread_, std::exchange(work.commands_, {})});
}

void Queue::wait(Work& work) {
  submit(work);
  const std::vector<Submitted> own = submissions_->of(work);
  for (const Submitted& one : own) one.commands->waitUntilCompleted();
  submissions_->remove(own);
  for (const Submitted& one : own) {
    work.gpu_seconds_ += one.commands->GPUEndTime() - one.commands->GPUStartTime();
  }
  const auto failed = std::ranges::find_if_not(own, completed);
  if (failed != own.end()) throw_command_error(failed->commands->error());
}

void Queue::wait_for_all() {
  const auto self = std::this_thread::get_id();
  std::vector<std::shared_ptr<Work>> alive;  // none may end under the lock
  std::vector<Work*> own;
  {
    const std::lock_guard lock(submissions_->mutex);
    for (const std::weak_ptr<Work>& one : submissions_->works) {
      std::shared_ptr<Work> work = one.lock();
      if (work == nullptr) continue;
      if (work->thread_ == self) own.push_back(work.get());
      alive.push_back(std::move(work));
    }
  }
  for (Work* const work : own) submit(*work);
  std::vector<Submitted> ended = submissions_->all();
  for (const Submitted& one : ended) one.commands->waitUntilCompleted();
  std::erase_if(ended, [&](const Submitted& one) {
    return !completed(one) && one.by != nullptr && one.thread != self;
  });
  submissions_->remove(ended);
  const auto failed = std::ranges::find_if_not(ended, completed);
  if (failed != ended.end()) throw_command_error(failed->commands->error());
}

}  // namespace moesaic::metal
