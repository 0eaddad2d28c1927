#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "backend/builtin.hpp"
#include "cpu/cpu_backend.hpp"
#include "moesaic/error.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic {
namespace {

constexpr std::size_t kCapacity = 64;

struct Registry {
  LeafMutex mutex;
  std::vector<std::shared_ptr<const Backend>> backends;

  Registry() {
    backends.reserve(kCapacity);  // spans given out must stay valid
    backends.push_back(std::make_shared<cpu::CpuBackend>());
  }
  /// Adds those of GPUs, which load drivers: not before somebody asks for more than the CPU.
  void complete() {
    if (complete_) return;
    std::vector<std::shared_ptr<const Backend>> found = cuda_backends();
    found.push_back(metal_backend());
    backends.insert(backends.begin() + 1, found.begin(), found.end());
    complete_ = true;
  }
  /// Never destroyed: contexts in static objects may outlive it.
  static Registry& get() {
    static Registry& registry = *new Registry;
    return registry;
  }

 private:
  bool complete_ = false;
};

}  // namespace

std::span<const std::shared_ptr<const Backend>> backends() {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  registry.complete();
  return registry.backends;
}

const Backend& backend_for(Device device) {
  Registry& registry = Registry::get();
  const std::lock_guard lock(registry.mutex);
  if (device.type != DeviceType::Cpu) registry.complete();
  std::string reason = "no such device";
  for (auto backend = registry.backends.rbegin(); backend != registry.backends.rend(); ++backend) {
    if ((*backend)->device_type() != device.type) continue;
    const BackendInfo info = (*backend)->info();
    if (!info.available) {
      reason = info.reason;
    } else if (std::ranges::find(info.devices, device) != info.devices.end()) {
      return **backend;
    }
  }
  throw DeviceError(
      Problem{"backend_for", to_string(device), "an available device", reason, "see backends()"});
}

std::shared_ptr<void> register_backend(std::shared_ptr<const Backend> backend) {
  require<ConfigError>(backend != nullptr, [] {
    return Problem{"register_backend", "backend", "a backend", "null", ""};
  });
  Registry& registry = Registry::get();
  auto* const key = const_cast<Backend*>(backend.get());
  {
    const std::lock_guard lock(registry.mutex);
    require<ConfigError>(registry.backends.size() < kCapacity, [] {
      return Problem{"register_backend", "backends", "at most " + std::to_string(kCapacity), "more",
                     ""};
    });
    registry.backends.push_back(std::move(backend));
  }
  return {key, [key](void*) {
            Registry& all = Registry::get();
            std::shared_ptr<const Backend> removed;  // its destructor runs without the lock
            const std::lock_guard lock(all.mutex);
            const auto found =
                std::ranges::find(all.backends, key, [](const auto& b) { return b.get(); });
            if (found == all.backends.end()) return;
            removed = *found;
            all.backends.erase(found);
          }};
}

}  // namespace moesaic
