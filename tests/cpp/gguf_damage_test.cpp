// GGUF files that were cut or changed at random: an error, or a file that can be read to its end, and
// never a crash.

#include <gtest/gtest.h>

#include <cstring>
#include <filesystem>
#include <iterator>
#include <string>

#include "gguf_fixture.hpp"
#include "random.hpp"

namespace moesaic::test {
namespace {

TEST_F(GgufTest, TruncatedAtEveryByte) {
  const std::string bytes = full_file().bytes();
  ASSERT_LE(bytes.size(), 65536u);
  const auto path = dir_.write("test.gguf", bytes);
  exercise(*GgufFile::open(path));
  for (std::size_t size = bytes.size(); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    ASSERT_THROW(GgufFile::open(path, size % 2 ? kRead : kMapped), FormatError) << size;
  }
}

TEST_F(GgufTest, TruncatedMetadataAtEveryByte) {
  const std::string bytes =
      GgufWriter().strings("a", {"x", "yy"}).array<float>("b", GgufType::F32, {1, 2}).bytes();
  const auto path = dir_.write("test.gguf", bytes);
  for (std::size_t size = bytes.size(); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    ASSERT_THROW(GgufFile::open(path), FormatError) << size;
  }
}

TEST_F(GgufTest, SeededCorruptions) {
  const std::string intact = full_file().bytes();
  const std::size_t head = intact.find("no dims") + 32;  // where a changed byte can matter most
  const std::uint64_t odd_values[] = {
      0,          1,          0x7f,       0xff,  0xffff,    ~0u,        1u << 31, 1ull << 32,
      1ull << 61, 1ull << 62, 1ull << 63, ~0ull, ~0ull - 7, ~0ull >> 1, 9,        8};
  testing::Random random(20240229);
  int refused = 0;
  int accepted = 0;
  const auto path = dir_.path() / "test.gguf";
  for (int round = 0; round < 12000; ++round) {
    std::string bytes = intact;
    const int changes = 1 + random.below(4);
    for (int change = 0; change < changes; ++change) {
      const auto at = static_cast<std::size_t>(random.below(static_cast<std::int64_t>(head)));
      switch (random.below(4)) {
        case 0:
          bytes[at] = static_cast<char>(random.bits());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random.below(8)));
          break;
        case 2: {
          const std::uint64_t value = odd_values[random.below(std::size(odd_values))];
          std::memcpy(bytes.data() + at, &value, random.below(2) ? 8 : 4);
          break;
        }
        case 3: {  // move a run of bytes
          const std::size_t size = 1 + static_cast<std::size_t>(random.below(24));
          bytes.erase(at, size);
          if (random.below(2)) bytes.insert(at, size, static_cast<char>(random.bits()));
          break;
        }
      }
    }
    dir_.write("test.gguf", bytes);
    try {
      exercise(*GgufFile::open(path, round % 2 ? kRead : kMapped));
      ++accepted;
    } catch (const FormatError&) {
      ++refused;
    } catch (const IoError& error) {
      ADD_FAILURE() << "round " << round << ": " << error.what();
    }
  }
  // Both ends of the test are reached; about one file in twenty can still be read.
  EXPECT_GT(accepted, 500);
  EXPECT_GT(refused, 500);
}

}  // namespace
}  // namespace moesaic::test
