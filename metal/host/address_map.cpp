#include "metal/host/address_map.hpp"

namespace moesaic::metal {

void AddressMap::insert(const void* begin, std::size_t bytes, void* buffer, std::size_t offset) {
  const auto address = reinterpret_cast<std::uintptr_t>(begin);
  const std::lock_guard lock(mutex_);
  ranges_.emplace(address, Range{address + bytes, buffer, offset});
}

void AddressMap::erase(const void* begin, const void* buffer) {
  const std::lock_guard lock(mutex_);
  auto [first, last] = ranges_.equal_range(reinterpret_cast<std::uintptr_t>(begin));
  for (; first != last; ++first) {
    if (first->second.buffer != buffer) continue;
    ranges_.erase(first);
    return;
  }
}

std::optional<AddressMap::Location> AddressMap::find(const void* address, std::size_t bytes) const {
  const auto at = reinterpret_cast<std::uintptr_t>(address);
  const std::lock_guard lock(mutex_);
  // Ranges seldom overlap, so the first candidate is nearly always the one.
  for (auto range = ranges_.upper_bound(at); range != ranges_.begin();) {
    --range;
    if (at + bytes <= range->second.end) {
      return Location{range->second.buffer, at - range->first + range->second.offset};
    }
  }
  return std::nullopt;
}

}  // namespace moesaic::metal
