// GGUF files in several shards: any of them opens all, and shards that do not belong together are
// refused.

#include <gtest/gtest.h>

#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "gguf_fixture.hpp"

namespace moesaic::test {
namespace {

class GgufShardTest : public GgufTest {
 protected:
  static GgufWriter shard(int index, int count, int total) {
    GgufWriter writer;
    if (index == 0) writer.string("general.architecture", "testmoe");
    writer.scalar<std::uint16_t>("split.no", GgufType::U16, static_cast<std::uint16_t>(index))
        .scalar<std::uint16_t>("split.count", GgufType::U16, static_cast<std::uint16_t>(count))
        .scalar<std::int32_t>("split.tensors.count", GgufType::I32, total);
    return writer;
  }
  static std::string name(int number, int count, const std::string& prefix = "model") {
    char text[64];
    std::snprintf(text, sizeof(text), "-%05d-of-%05d.gguf", number, count);
    return prefix + text;
  }
  /// Three shards with one, zero and two tensors.
  void write_all() {
    dir_.write(name(1, 3), shard(0, 3, 3).filled("a", QuantType::F32, {3}).bytes());
    dir_.write(name(2, 3), shard(1, 3, 3).bytes());
    dir_.write(name(3, 3), shard(2, 3, 3)
                               .filled("blk.4.ffn_up_exps.weight", QuantType::F32, {5})
                               .filled("c", QuantType::F32, {7})
                               .bytes());
  }
  void expect_shard_error(const std::string& file, const std::vector<std::string>& parts) {
    try {
      GgufFile::open(dir_.path() / file);
      ADD_FAILURE() << "accepted; wanted " << parts.front();
    } catch (const FormatError& error) {
      const std::string message = error.what();
      for (const std::string& part : parts) {
        EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
      }
    }
  }
};

TEST_F(GgufShardTest, AnyShardOpensAll) {
  write_all();
  for (const auto options : {kMapped, kRead}) {
    for (int given = 1; given <= 3; ++given) {
      const auto file = GgufFile::open(dir_.path() / name(given, 3), options);
      EXPECT_EQ(file->path(), dir_.path() / name(given, 3));
      ASSERT_EQ(file->shard_paths().size(), 3u);
      EXPECT_EQ(file->shard_paths()[1], dir_.path() / name(2, 3));
      ASSERT_EQ(file->tensors().size(), 3u);
      EXPECT_EQ(file->tensors()[0].name, "a");
      EXPECT_EQ(file->tensor("c")->shard, 2u);
      EXPECT_EQ(file->string("general.architecture"), "testmoe");
      EXPECT_EQ(file->integer("split.no"), 0);
      EXPECT_EQ(file->moe_layers(), std::vector<std::int32_t>{4});
      std::uint64_t total = 0;
      for (const auto& path : file->shard_paths()) total += std::filesystem::file_size(path);
      EXPECT_EQ(file->file_bytes(), total);
      for (const GgufTensor& tensor : file->tensors()) {
        std::ifstream in(file->shard_paths()[tensor.shard], std::ios::binary);
        std::string expected(tensor.nbytes, '\0');
        in.seekg(static_cast<std::streamoff>(tensor.offset));
        in.read(expected.data(), static_cast<std::streamsize>(expected.size()));
        EXPECT_EQ(text_of(file->bytes(tensor)), expected);
      }
      exercise(*file);
    }
  }
}

TEST_F(GgufShardTest, HoldingBytesOfAnyShardRefusesClosing) {
  write_all();
  const auto file = GgufFile::open(dir_.path() / name(1, 3));
  GgufBytes held = file->bytes(*file->tensor("c"));
  EXPECT_THROW(file->close(), DeviceError);
  EXPECT_NO_THROW(file->bytes(*file->tensor("a")));  // nothing was closed half way
  held = {};
  EXPECT_NO_THROW(file->close());
}

TEST_F(GgufShardTest, AMissingShardIsAnIoError) {
  write_all();
  std::filesystem::remove(dir_.path() / name(2, 3));
  try {
    GgufFile::open(dir_.path() / name(1, 3));
    ADD_FAILURE();
  } catch (const IoError& error) {
    EXPECT_EQ(error.code(), ENOENT);
    EXPECT_NE(error.path().find(name(2, 3)), std::string::npos);
  }
}

TEST_F(GgufShardTest, WrongShardsAreRefused) {
  write_all();
  dir_.write(name(2, 3), shard(2, 3, 3).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.no", "expected 1", "got 2"});
  dir_.write(name(2, 3), shard(1, 4, 3).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.count", "expected 3", "got 4"});
  dir_.write(name(2, 3), shard(1, 3, 9).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.tensors.count", "expected 3", "got 9"});
  dir_.write(name(2, 3), GgufWriter().bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.count"});
  dir_.write(name(2, 3), shard(1, 3, 3).filled("a", QuantType::F32, {3}).bytes());
  expect_shard_error(name(1, 3), {"split.tensors.count", "expected 3", "got 4"});
  dir_.write(name(3, 3), shard(2, 3, 3).filled("c", QuantType::F32, {3}).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "'a'", "unique tensor names", name(1, 3)});
}

TEST_F(GgufShardTest, NamesMustAgreeWithTheKeys) {
  dir_.write("renamed.gguf", shard(0, 3, 3).bytes());
  expect_shard_error("renamed.gguf", {"-00001-of-00003.gguf"});
  dir_.write(name(2, 3), shard(0, 3, 3).bytes());
  expect_shard_error(name(2, 3), {"-00001-of-00003.gguf"});
  dir_.write(name(1, 4), shard(0, 3, 3).bytes());
  expect_shard_error(name(1, 4), {"-00001-of-00003.gguf"});
}

TEST_F(GgufShardTest, KeysMustBeInRange) {
  dir_.write(name(1, 3), shard(3, 3, 3).bytes());
  expect_shard_error(name(1, 3), {"split.no", "0 to 2", "got 3"});
  dir_.write(name(1, 3),
             GgufWriter().scalar<std::int64_t>("split.count", GgufType::I64, 1 << 20).bytes());
  expect_shard_error(name(1, 3), {"split.count", "1048576"});
  dir_.write(name(1, 3),
             GgufWriter().scalar<std::int32_t>("split.count", GgufType::I32, -2).bytes());
  expect_shard_error(name(1, 3), {"split.count", "-2"});
  dir_.write(name(1, 3), GgufWriter().u32("split.count", 3).bytes());
  expect_shard_error(name(1, 3), {"split.no", "no such key"});
  dir_.write(name(1, 3), GgufWriter().string("split.count", "3").bytes());
  expect_shard_error(name(1, 3), {"split.count", "an integer", "string"});
}

TEST_F(GgufShardTest, OneShardOrNoneIsOneFile) {
  dir_.write(name(1, 1), shard(0, 1, 1).filled("a", QuantType::F32, {3}).bytes());
  EXPECT_EQ(GgufFile::open(dir_.path() / name(1, 1))->tensors().size(), 1u);
  // A name alone does not make a split file.
  dir_.write(name(1, 9), GgufWriter().filled("a", QuantType::F32, {3}).bytes());
  EXPECT_EQ(GgufFile::open(dir_.path() / name(1, 9))->shard_paths().size(), 1u);
}

TEST_F(GgufShardTest, KeysLeftInAWholeFile) {
  const auto whole = [](int tensors) {
    return shard(0, 3, tensors).filled("a", QuantType::F32, {3}).filled("b", QuantType::F32, {3});
  };
  dir_.write("merged.gguf", whole(2).bytes());
  const auto file = GgufFile::open(dir_.path() / "merged.gguf");
  EXPECT_EQ(file->shard_paths().size(), 1u);
  EXPECT_EQ(file->tensors().size(), 2u);
  // Another count may mean that tensors are missing.
  dir_.write("part.gguf", whole(3).bytes());
  expect_shard_error("part.gguf", {"-00001-of-00003.gguf", "split.count 3", "--remove-metadata"});
  // Under a shard's name the others are asked for.
  dir_.write(name(1, 3), whole(2).bytes());
  EXPECT_THROW(GgufFile::open(dir_.path() / name(1, 3)), IoError);
}

TEST_F(GgufShardTest, RelativePathsWork) {
  write_all();
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir_.path());
  std::shared_ptr<GgufFile> file;
  EXPECT_NO_THROW(file = GgufFile::open(name(2, 3)));
  std::filesystem::current_path(before);
  ASSERT_NE(file, nullptr);
  EXPECT_EQ(file->tensors().size(), 3u);
}

}  // namespace
}  // namespace moesaic::test
