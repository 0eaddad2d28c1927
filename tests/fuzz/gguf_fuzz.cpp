/// Feeds arbitrary bytes to the GGUF reader, as one file, mapped and read.

#include <cstddef>
#include <cstdint>
#include <span>

#include "gguf_exercise.hpp"
#include "memory_file.hpp"
#include "moesaic/gguf.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const moesaic::fuzz::MemoryFile file;
  file.append(std::as_bytes(std::span(data, size)));
  for (const bool mmap : {true, false}) {
    moesaic::test::allow_format_error(
        [&] { moesaic::test::exercise(*moesaic::GgufFile::open(file.path(), {mmap})); });
  }
  return 0;
}
