#include "cuda/backend/constants.hpp"

#include <algorithm>
#include <cstring>
#include <string_view>

#include "moesaic/error.hpp"

namespace moesaic::cuda {
namespace {

std::uint64_t hash_of(std::span<const float> values) {
  return std::hash<std::string_view>{}(
      {reinterpret_cast<const char*>(values.data()), values.size_bytes()});
}

}  // namespace

Constants::~Constants() {
  for (const auto& [hash, entry] : entries_) gpu_->deallocate(entry.memory);
}

const float* Constants::find(std::span<const float> values, std::string_view operation,
                             Stream stream) const {
  if (values.empty()) return nullptr;
  {
    const std::lock_guard lock(pins_->mutex);
    const auto pinned = pins_->memory.find({values.data(), values.size()});
    if (pinned != pins_->memory.end()) return static_cast<const float*>(pinned->second.get());
  }
  const std::uint64_t hash = hash_of(values);
  const std::lock_guard lock(mutex_);
  const auto [begin, end] = entries_.equal_range(hash);
  for (auto at = begin; at != end; ++at) {
    const std::vector<float>& known = at->second.values;
    // Bits, so that a NaN finds itself.
    if (known.size() == values.size() &&
        std::memcmp(known.data(), values.data(), values.size_bytes()) == 0) {
      return static_cast<const float*>(at->second.memory);
    }
  }
  require<CaptureError>(!gpu_->capturing(stream), [&] {
    return Problem{.operation = std::string(operation),
                   .what = "router weights or biases",
                   .expected = "values that are on the device",
                   .got = "an upload while a graph is recorded",
                   .hint = "run the call once before the capture"};
  });
  void* const memory = gpu_->allocate(values.size_bytes());
  try {
    gpu_->copy(memory, values.data(), values.size_bytes());
    entries_.emplace(hash, Entry{{values.begin(), values.end()}, memory});
  } catch (...) {
    gpu_->deallocate(memory);
    throw;
  }
  return static_cast<const float*>(memory);
}

std::shared_ptr<const void> Constants::pin(std::span<const float> values) const {
  if (values.empty()) return nullptr;
  const std::shared_ptr<void> memory(gpu_->allocate(values.size_bytes()),
                                     [gpu = gpu_](void* p) { gpu->deallocate(p); });
  gpu_->copy(memory.get(), values.data(), values.size_bytes());
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
