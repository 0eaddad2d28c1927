#pragma once

/// Files by their descriptors: opened, read at an offset, and closed, whatever signals arrive.

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <utility>

namespace moesaic {

/// Bytes of one call to the system, between two looks at what interrupts (Interrupt::check).
inline constexpr std::size_t kMaxFileCall = std::size_t{1} << 25;

/// An open file, closed with this; or none.
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int descriptor) : descriptor_(descriptor) {}
  ~Descriptor() { reset(); }
  Descriptor(Descriptor&& other) noexcept : descriptor_(other.release()) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    const int taken = other.release();
    reset();
    descriptor_ = taken;
    return *this;
  }

  int get() const { return descriptor_; }
  explicit operator bool() const { return descriptor_ >= 0; }
  int release() { return std::exchange(descriptor_, -1); }
  void reset();

 private:
  int descriptor_ = -1;
};

/// open(2), not for programs that this process starts. None where it fails, with errno.
Descriptor open_file(const std::filesystem::path& path, int flags, int mode = 0);
/// For reading. Of a named pipe no writer is waited for.
Descriptor open_to_read(const std::filesystem::path& path);

/// Bytes read from `offset` on, fewer than `out` has at the end of the file; -1 with errno. Throws
/// OperationCancelled when it is interrupted.
ssize_t read_file(int descriptor, std::uint64_t offset, std::span<std::byte> out);

}  // namespace moesaic
