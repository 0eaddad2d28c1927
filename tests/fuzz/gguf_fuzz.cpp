/// Feeds arbitrary bytes to the GGUF reader, as one file, mapped and read. With libFuzzer it is a
/// fuzz target; without (MOESAIC_FUZZ_REPLAY) it is a program that replays the files it is given.

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "gguf_exercise.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  // A file without a place on disk, so that runs neither wear a disk nor meet each other.
  const int descriptor = ::memfd_create("gguf_fuzz", MFD_CLOEXEC);
  if (descriptor < 0) std::abort();
  for (std::size_t done = 0; done < size;) {
    const ssize_t count = ::write(descriptor, data + done, size - done);
    if (count <= 0) std::abort();
    done += static_cast<std::size_t>(count);
  }
  const std::string path = "/proc/self/fd/" + std::to_string(descriptor);
  for (const bool mmap : {true, false}) {
    moesaic::test::allow_format_error(
        [&] { moesaic::test::exercise(*moesaic::GgufFile::open(path, {mmap})); });
  }
  ::close(descriptor);
  return 0;
}

#ifdef MOESAIC_FUZZ_REPLAY
int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    std::FILE* file = std::fopen(argv[i], "rb");
    if (file == nullptr) {
      std::perror(argv[i]);
      return 1;
    }
    std::string bytes;
    char chunk[1 << 16];
    for (std::size_t count; (count = std::fread(chunk, 1, sizeof(chunk), file)) > 0;) {
      bytes.append(chunk, count);
    }
    std::fclose(file);
    LLVMFuzzerTestOneInput(reinterpret_cast<const std::uint8_t*>(bytes.data()), bytes.size());
    std::printf("%s: ok\n", argv[i]);
  }
  return 0;
}
#endif
