#include "base/open_file.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

#include "moesaic/interrupt.hpp"

namespace moesaic {

void Descriptor::reset() {
  if (descriptor_ >= 0) ::close(release());
}

Descriptor open_file(const std::filesystem::path& path, int flags, int mode) {
  int descriptor = -1;
  do {
    descriptor = ::open(path.c_str(), flags | O_CLOEXEC, mode);
  } while (descriptor < 0 && errno == EINTR);
  return Descriptor(descriptor);
}

Descriptor open_to_read(const std::filesystem::path& path) {
  // Without O_NONBLOCK, opening a named pipe would wait for a writer.
  return open_file(path, O_RDONLY | O_NONBLOCK);
}

ssize_t read_file(int descriptor, std::uint64_t offset, std::span<std::byte> out) {
  std::size_t done = 0;
  while (done < out.size()) {
    Interrupt::check();
    const ssize_t got =
        ::pread(descriptor, out.data() + done, std::min(out.size() - done, kMaxFileCall),
                static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return -1;
    if (got == 0) break;
    done += static_cast<std::size_t>(got);
  }
  return static_cast<ssize_t>(done);
}

}  // namespace moesaic
