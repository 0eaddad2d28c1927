#include "metal/host/memory.hpp"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <string>

#include "metal/host/errors.hpp"
#include "metal/host/system.hpp"

namespace moesaic::metal {
namespace {

/// How often residency is asked for; the system's own patience is longer, and not documented.
constexpr std::chrono::milliseconds kResidencyInterval{500};

std::uintptr_t page_bytes() {
  static const auto bytes = static_cast<std::uintptr_t>(::sysconf(_SC_PAGESIZE));
  return bytes;
}

}  // namespace

Memory::Memory(MTL::Device* device) : device_(device) {}

NS::SharedPtr<MTL::Buffer> Memory::create(std::size_t bytes) {
  // An empty buffer does not exist.
  auto buffer = NS::TransferPtr(
      device_->newBuffer(std::max<std::size_t>(bytes, 16), MTL::ResourceStorageModeShared));
  require<OutOfMemoryError>(buffer.get() != nullptr, [&] {
    return Problem{"metal", "allocate", std::to_string(bytes) + " bytes",
                   "no buffer; the largest one has " + std::to_string(max_bytes()),
                   "use a smaller batch or fewer loaded layers"};
  });
  return buffer;
}

void* Memory::allocate(std::size_t bytes) {
  const NS::SharedPtr<MTL::Buffer> buffer = create(bytes);
  void* const memory = buffer->contents();
  map_.insert(memory, buffer->length(), buffer.get());
  held_.insert(memory, buffer->length(), buffer.get());
  buffer->retain();  // released by deallocate
  return memory;
}

void Memory::deallocate(void* memory) noexcept {
  const auto found = held_.find(memory);
  if (!found) return;
  held_.erase(memory, found->buffer);
  map_.erase(memory, found->buffer);
  static_cast<MTL::Buffer*>(found->buffer)->release();
}

std::shared_ptr<const void> Memory::adopt(const void* begin, std::size_t bytes) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::uintptr_t first = address / page_bytes() * page_bytes();
  const std::uintptr_t last = (address + bytes + page_bytes() - 1) / page_bytes() * page_bytes();
  if (last - first > max_bytes()) return nullptr;
  MTL::Buffer* const buffer = device_->newBuffer(reinterpret_cast<const void*>(first), last - first,
                                                 MTL::ResourceStorageModeShared, nullptr);
  if (buffer == nullptr) return nullptr;
  return map_while_alive(begin, bytes, buffer, address - first);
}

std::shared_ptr<const void> Memory::share(void* begin, std::size_t bytes) {
  if (held_.find(begin, bytes)) return {std::shared_ptr<const void>(), begin};
  if (reinterpret_cast<std::uintptr_t>(begin) % page_bytes() != 0) return nullptr;
  return adopt(begin, bytes);
}

SharedHandle Memory::share_buffer(MTL::Buffer* buffer) {
  void* const begin = buffer->contents();
  require<DeviceError>(begin != nullptr, [] {
    return Problem{"metal", "array", "a buffer in memory that the host reaches",
                   "one of storage mode private", "copy it to a shared one"};
  });
  const std::size_t bytes = buffer->length();
  buffer->retain();
  held_.insert(begin, bytes, buffer);
  const std::shared_ptr<const void> mapped = map_while_alive(begin, bytes, buffer, 0);
  return {
      begin, bytes, {begin, [this, mapped, buffer](const void* at) { held_.erase(at, buffer); }}};
}

std::shared_ptr<const void> Memory::mirror(const void* from, std::size_t bytes) {
  return map_while_alive(from, bytes, copy_of(from, bytes)->retain(), 0);
}

std::shared_ptr<const void> Memory::map_while_alive(const void* begin, std::size_t bytes,
                                                    MTL::Buffer* buffer, std::size_t offset) {
  map_.insert(begin, bytes, buffer, offset);
  return {buffer, [this, begin](MTL::Buffer* b) {
            const AutoreleaseScope scope;
            map_.erase(begin, b);
            b->release();
          }};
}

NS::SharedPtr<MTL::Buffer> Memory::copy_of(const void* from, std::size_t bytes) {
  NS::SharedPtr<MTL::Buffer> buffer = create(bytes);
  std::memcpy(buffer->contents(), from, bytes);
  return buffer;
}

std::shared_ptr<const void> Memory::keep_resident(const void* address) {
  const auto found = map_.find(address);
  if (!found || !is_macos(15)) return nullptr;
  const auto wish = NS::TransferPtr(MTL::ResidencySetDescriptor::alloc()->init());
  NS::Error* error = nullptr;
  MTL::ResidencySet* const made = device_->newResidencySet(wish.get(), &error);
  if (made == nullptr) return nullptr;
  // A set of its own for each buffer: sets are for one thread at a time.
  const std::shared_ptr<MTL::ResidencySet> set(made, [](MTL::ResidencySet* s) {
    const AutoreleaseScope scope;
    s->endResidency();
    s->release();
  });
  set->addAllocation(static_cast<MTL::Buffer*>(found->buffer));
  set->commit();
  set->requestResidency();
  const std::lock_guard lock(residency_mutex_);
  std::erase_if(resident_, [](const auto& one) { return one.expired(); });
  resident_.push_back(set);
  return set;
}

void Memory::request_residency() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  auto last = requested_.load();
  if (now - std::chrono::steady_clock::duration(last) < kResidencyInterval) return;
  if (!requested_.compare_exchange_strong(last, now.count())) return;  // another thread does it
  std::vector<std::shared_ptr<MTL::ResidencySet>> sets;
  {
    const std::lock_guard lock(residency_mutex_);
    for (const auto& one : resident_) {
      if (auto set = one.lock()) sets.push_back(std::move(set));
    }
  }
  for (const auto& set : sets) set->requestResidency();
}

bool Memory::holds(const void* address, std::size_t bytes) const {
  return map_.find(address, bytes).has_value();
}

BufferSlice Memory::find(const void* address, const char* what) const {
  const auto found = map_.find(address);
  require<DeviceError>(found.has_value(), [&] {
    return Problem{"metal", what, "memory of the Metal backend", "memory of the host",
                   "take it from Backend::allocate"};
  });
  return {static_cast<MTL::Buffer*>(found->buffer), found->offset};
}

}  // namespace moesaic::metal
