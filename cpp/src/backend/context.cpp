#include "moesaic/context.hpp"

#include <string>
#include <utility>

#include "moesaic/error.hpp"

namespace moesaic {
namespace {

/// tuning.backend by name, or the backend of the device.
const Backend& choose_backend(Device device, const Tuning& tuning) {
  if (tuning.backend.empty()) return backend_for(device);
  std::string known;
  const Backend* named = nullptr;
  for (const auto& backend : backends()) {
    const BackendInfo info = backend->info();
    if (info.name == tuning.backend) {
      require<DeviceError>(info.available, [&] {
        return Problem{"Context", "backend " + info.name, "an available backend", info.reason, ""};
      });
      // Several devices of one name: the one asked for, else the first.
      if (named == nullptr || backend->device() == device) named = backend.get();
    }
    if (!known.empty()) known += ", ";
    known += info.name;
  }
  if (named != nullptr) return *named;
  throw DeviceError(Problem{"Context", "backend", known, tuning.backend, ""});
}

}  // namespace

Context::Context(Device device, const Tuning& tuning)
    : Context(choose_backend(device, tuning), tuning,
              ThreadPool::shared(tuning.threads.value_or(0), tuning.numa.count)) {}

Context::Context(const Backend& backend, const Tuning& tuning, std::shared_ptr<ThreadPool> pool)
    : backend_(&backend), tuning_(tuning), pool_(std::move(pool)) {
  tuning_.validate();
}

// A zone of a context may wait for its stream, which base/ cannot do: it knows no backends.

ScopedZone::ScopedZone(Context& context, Zone zone) : ScopedZone(context.profiler(), zone) {
  if (profiler_ != nullptr && profiler_->waits()) context_ = &context;
}

void ScopedZone::wait() const noexcept {
  try {
    const Backend& backend = context_->backend();
    if (!backend.capturing(*context_)) backend.synchronize(*context_);
  } catch (...) {  // zones end in destructors
    context_->keep_error(std::current_exception());
  }
}

}  // namespace moesaic
