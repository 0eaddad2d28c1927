#include "cuda/backend/constants.hpp"

#include <cstring>
#include <string_view>

#include "moesaic/error.hpp"

namespace moesaic::cuda {
namespace {

std::uint64_t hash_of(HostValues values) {
  return std::hash<std::string_view>{}(
      {reinterpret_cast<const char*>(values.data()), values.size()});
}

}  // namespace

Constants::~Constants() {
  for (const auto& [hash, entry] : entries_) gpu_->deallocate(entry.memory);
}

const void* Constants::find(HostValues values, std::string_view operation, Stream stream) const {
  if (values.empty()) return nullptr;
  {
    const std::lock_guard lock(pins_->mutex);
    const auto pinned = pins_->memory.find({values.data(), values.size()});
    if (pinned != pins_->memory.end()) return pinned->second.get();
  }
  const std::uint64_t hash = hash_of(values);
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = entries_.equal_range(hash);
  for (auto at = begin; at != end; ++at) {
    const std::vector<std::byte>& known = at->second.values;
    if (known.size() == values.size() &&
        std::memcmp(known.data(), values.data(), values.size()) == 0) {
      return at->second.memory;
    }
  }
  require<CaptureError>(!gpu_->capturing(stream), [&] {
    return Problem{.operation = std::string(operation),
                   .what = "router weights, biases, norms or token table",
                   .expected = "values that are on the device",
                   .got = "an upload while a graph is recorded",
                   .hint = "run the call once before the capture"};
  });
  void* const memory = gpu_->allocate(values.size());
  try {
    gpu_->upload(memory, values.data(), values.size());
    entries_.emplace(hash, Entry{{values.begin(), values.end()}, memory});
  } catch (...) {
    gpu_->deallocate(memory);
    throw;
  }
  return memory;
}

std::shared_ptr<const void> Constants::pin(HostValues values) const {
  if (values.empty()) return nullptr;
  const std::shared_ptr<void> memory(gpu_->allocate(values.size()),
                                     [gpu = gpu_](void* p) { gpu->deallocate(p); });
  gpu_->upload(memory.get(), values.data(), values.size());
  const std::pair key{values.data(), values.size()};
  {
    const std::lock_guard lock(pins_->mutex);
    pins_->memory[key] = memory;
  }
  return {memory.get(), [pins = pins_, memory, key](const void*) {
            const std::lock_guard lock(pins->mutex);
            const auto found = pins->memory.find(key);
            if (found != pins->memory.end() && found->second == memory) pins->memory.erase(found);
          }};
}

}  // namespace moesaic::cuda
