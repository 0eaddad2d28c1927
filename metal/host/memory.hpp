#pragma once

/// Buffers in unified memory, found again by address.

#include <atomic>
#include <chrono>
#include <cstddef>
#include <memory>
#include <vector>

#include "metal/host/address_map.hpp"
#include "metal/host/metal_cpp.hpp"
#include "moesaic/backend_facts.hpp"
#include "moesaic/leaf_mutex.hpp"

namespace moesaic::metal {

struct BufferSlice {
  MTL::Buffer* buffer;
  NS::UInteger offset;
};

class Memory {
 public:
  explicit Memory(MTL::Device* device);

  /// Bytes of the largest buffer.
  std::size_t max_bytes() const { return device_->maxBufferLength(); }
  /// Throws OutOfMemoryError.
  void* allocate(std::size_t bytes);
  void deallocate(void* memory) noexcept;

  /// Makes [begin, begin + bytes), pages of a mapped file, readable by kernels without a copy, as
  /// long as the result lives. Null when the driver refuses.
  std::shared_ptr<const void> adopt(const void* begin, std::size_t bytes);

  /// Makes [begin, begin + bytes) of the caller usable by kernels in place, as long as the result
  /// lives: memory of `allocate` or of another package's buffer, or what begins at a page. Null
  /// otherwise, and when the driver refuses.
  std::shared_ptr<const void> share(void* begin, std::size_t bytes);
  /// The memory of a buffer that another package made.
  SharedHandle share_buffer(MTL::Buffer* buffer);

  /// A copy that is found by the address of the original, which must not change, as long as the
  /// result lives.
  std::shared_ptr<const void> mirror(const void* from, std::size_t bytes);

  /// A buffer of its own that holds a copy; for arrays of the host that one call reads.
  NS::SharedPtr<MTL::Buffer> copy_of(const void* from, std::size_t bytes);

  /// Asks the system to keep the buffer that holds `address` in memory while the result lives, so
  /// that weights which no command used for a while need not come back first. Null before macOS 15,
  /// which has no such wish, and when the driver refuses.
  std::shared_ptr<const void> keep_resident(const void* address);
  /// Asks once more, some time after the last time: the system forgets such wishes of an idle
  /// program.
  void request_residency();

  bool holds(const void* address, std::size_t bytes = 1) const;
  /// Throws DeviceError naming `what` for memory that no buffer holds.
  BufferSlice find(const void* address, const char* what) const;

 private:
  NS::SharedPtr<MTL::Buffer> create(std::size_t bytes);
  /// Takes the buffer over.
  std::shared_ptr<const void> map_while_alive(const void* begin, std::size_t bytes,
                                              MTL::Buffer* buffer, std::size_t offset);

  MTL::Device* device_;
  AddressMap map_;
  /// The ranges in `map_` that callers hold. Ranges that nobody holds go when the call that asked for
  /// them has done, which may be one of another thread.
  AddressMap held_;
  LeafMutex residency_mutex_;
  std::vector<std::weak_ptr<MTL::ResidencySet>> resident_;
  std::atomic<std::chrono::steady_clock::rep> requested_{0};  ///< when, by the steady clock
};

}  // namespace moesaic::metal
