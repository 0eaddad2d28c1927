#pragma once

/// What the fuzz targets of GGUF files share: a file that has a name but no place on a disk, so that
/// runs neither wear a disk nor meet each other.

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <span>
#include <string>

namespace moesaic::fuzz {

class MemoryFile {
 public:
  MemoryFile() : descriptor_(::memfd_create("fuzz", MFD_CLOEXEC)) {
    if (descriptor_ < 0) give_up("memfd_create");
  }
  ~MemoryFile() { ::close(descriptor_); }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;

  void append(std::span<const std::byte> bytes) const {
    while (!bytes.empty()) {
      const ssize_t count = ::write(descriptor_, bytes.data(), bytes.size());
      if (count <= 0) give_up("write");
      bytes = bytes.subspan(static_cast<std::size_t>(count));
    }
  }
  std::string path() const { return "/proc/self/fd/" + std::to_string(descriptor_); }

 private:
  [[noreturn]] static void give_up(const char* what) {
    std::perror(what);
    std::abort();
  }
  int descriptor_;
};

}  // namespace moesaic::fuzz
