// Who holds an open GGUF file: bytes that outlive it, closing that waits for nobody, readers in
// several threads, and files that change underneath.

#include <gtest/gtest.h>

#include <atomic>
#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "gguf_fixture.hpp"

namespace moesaic::test {
namespace {

TEST_F(GgufTest, CloseRefusesWhileBytesAreHeld) {
  const auto file = open(full_file().bytes());
  const GgufTensor& tensor = file->tensors()[0];
  GgufBytes held = file->bytes(tensor);
  GgufBytes copy = held;
  EXPECT_THROW(file->close(), DeviceError);
  held = {};
  EXPECT_THROW(file->close(), DeviceError);
  EXPECT_FALSE(file->closed());
  EXPECT_EQ(text_of(copy).size(), tensor.nbytes);
  copy = {};
  file->close();
  EXPECT_TRUE(file->closed());
  EXPECT_NO_THROW(file->close());
  EXPECT_THROW(file->bytes(tensor), DeviceError);
  // What was read at opening stays.
  EXPECT_EQ(file->tensors().size(), 7u);
  EXPECT_EQ(std::get<GgufArray>(file->find("t.tokens")->value).as_strings().size(), 4u);
}

TEST_F(GgufTest, BytesOutliveTheFile) {
  for (const auto options : {kMapped, kRead}) {
    const std::string bytes = full_file().bytes();
    auto file = open(bytes, options);
    const GgufTensor tensor = file->tensors()[1];
    const GgufBytes held = file->bytes(tensor);
    file.reset();
    EXPECT_EQ(text_of(held), bytes.substr(tensor.offset, tensor.nbytes));
  }
}

TEST_F(GgufTest, ReadModeBuffersAreTheirOwnAndDoNotHinderClosing) {
  const auto file = open(full_file().bytes(), kRead);
  const GgufBytes first = file->bytes(file->tensors()[0]);
  const GgufBytes second = file->bytes(file->tensors()[0]);
  EXPECT_NE(first.bytes.data(), second.bytes.data());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first.bytes.data()) % 64, 0u);
  EXPECT_NO_THROW(file->close());
  EXPECT_THROW(file->bytes(file->tensors()[0]), DeviceError);
  EXPECT_EQ(text_of(first), text_of(second));
}

TEST_F(GgufTest, ConcurrentReadersSeeTheSame) {
  for (const auto options : {kMapped, kRead}) {
    const auto file = open(full_file().bytes(), options);
    const std::uint64_t expected = exercise(*file);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 50; ++i) wrong += exercise(*file) != expected;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_NO_THROW(file->close());
  }
}

TEST_F(GgufTest, ClosingRacesWithReadersSafely) {
  for (int round = 0; round < 20; ++round) {
    const auto file = open(full_file().bytes());
    std::thread reader([&] {
      try {
        for (int i = 0; i < 1000; ++i) exercise(*file);
      } catch (const DeviceError&) {
      }
    });
    while (!file->closed()) {
      try {
        file->close();
      } catch (const DeviceError&) {
        std::this_thread::yield();
      }
    }
    reader.join();
  }
}

TEST_F(GgufTest, ReadModeSurvivesATruncatedFile) {
  const auto file = open(full_file().bytes(), kRead);
  std::filesystem::resize_file(file->path(), 40);
  EXPECT_EQ(std::get<GgufArray>(file->find("t.tokens")->value).as_strings().size(), 4u);
  EXPECT_THROW(file->bytes(file->tensors()[0]), FormatError);
}

TEST_F(GgufTest, TensorsOfAnotherFileAreRefused) {
  const auto file = open(full_file().bytes());
  GgufTensor foreign = file->tensors()[0];
  foreign.shard = 1;
  EXPECT_THROW(file->bytes(foreign), FormatError);
  foreign.shard = 0;
  foreign.offset = file->file_bytes() - 1;
  EXPECT_THROW(file->bytes(foreign), FormatError);
  foreign.offset = ~0ull;
  EXPECT_THROW(file->bytes(foreign), FormatError);
  foreign.offset = 0;
  foreign.nbytes = file->file_bytes() + 1;
  EXPECT_THROW(file->bytes(foreign), FormatError);
}

}  // namespace
}  // namespace moesaic::test
