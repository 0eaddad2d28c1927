#pragma once

/// Which buffer holds an address. Unified memory has one address for CPU and GPU, but the GPU is
/// given buffers: this is the way back. Plain C++.

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>

#include "moesaic/leaf_mutex.hpp"

namespace moesaic::metal {

class AddressMap {
 public:
  struct Location {
    void* buffer;
    std::size_t offset;  ///< bytes from the buffer's begin
  };

  /// [begin, begin + bytes) lies in `buffer`, `offset` bytes behind its begin. Ranges may overlap;
  /// the one that begins last is found first.
  void insert(const void* begin, std::size_t bytes, void* buffer, std::size_t offset = 0);
  /// Removes the range of this buffer.
  void erase(const void* begin, const void* buffer);
  /// Where all of [address, address + bytes) lies, if it does.
  std::optional<Location> find(const void* address, std::size_t bytes = 1) const;

 private:
  struct Range {
    std::uintptr_t end;
    void* buffer;
    std::size_t offset;
  };
  mutable LeafMutex mutex_;
  std::multimap<std::uintptr_t, Range> ranges_;  // by begin
};

}  // namespace moesaic::metal
