// Files of bytes that can be made again: what is taken for one, what is not, and what stays behind.

#include "base/cache_file.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <fstream>
#include <iterator>
#include <random>
#include <thread>

#include "moesaic/error.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/interrupt.hpp"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

std::vector<std::byte> noise(std::size_t size, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::byte> bytes(size);
  for (std::byte& b : bytes) b = static_cast<std::byte>(random());
  return bytes;
}

std::string text_of_file(const fs::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_text(const fs::path& path, const std::string& text) {
  std::ofstream(path, std::ios::binary) << text;
}

class CacheFile : public ::testing::Test {
 protected:
  void SetUp() override {
    entry.folder = fs::path(::testing::TempDir()) /
                   ("cache_" + std::to_string(::getpid()) + "_" +
                    ::testing::UnitTest::GetInstance()->current_test_info()->name());
    fs::remove_all(entry.folder);
    fs::create_directories(entry.folder);
  }
  void TearDown() override { fs::remove_all(entry.folder); }

  void write(const std::vector<std::byte>& bytes, const CacheEntry& to) const {
    const auto lock = FolderLock::take(to.folder);
    ASSERT_NE(lock, nullptr);
    EntryWriter writer(to, *lock);
    // In pieces of several sizes, which the hash must not show.
    const std::span<const std::byte> all(bytes);
    const std::size_t first = BlockHash::kBlock * 3;
    writer.write(all.first(first));
    writer.write(all.subspan(first));
    writer.finish();
  }
  void write() const { write(bytes, entry); }
  /// What map_entry says of a file that it does not take; empty where it takes it.
  std::string why_not(const CacheEntry& wanted) const {
    std::string why;
    return map_entry(wanted, why) == nullptr ? why : "";
  }
  std::size_t files() const {
    return static_cast<std::size_t>(
        std::distance(fs::directory_iterator(entry.folder), fs::directory_iterator()));
  }

  const std::vector<std::byte> bytes = noise(64 * 100, 1);
  CacheEntry entry{{},
                   "one.panels",
                   {{"layout", "1"}, {"source file", "0123"}},
                   static_cast<std::int64_t>(bytes.size())};
};

TEST_F(CacheFile, GivesBackWhatWasWritten) {
  EXPECT_EQ(why_not(entry), "there is none");
  write();
  std::string why;
  const auto mapped = map_entry(entry, why);
  ASSERT_NE(mapped, nullptr) << why;
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), mapped.get()));
  EXPECT_EQ(check_entry(entry.path()), "");
  EXPECT_EQ(files(), 1U);
  // A later file takes the name; who has mapped the old one keeps it.
  const std::vector<std::byte> others = noise(bytes.size(), 2);
  CacheEntry changed = entry;
  changed.facts[1].second = "4567";
  write(others, changed);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), mapped.get()));
  EXPECT_EQ(why_not(entry), "it is of another source file");
  EXPECT_EQ(why_not(changed), "");
}

TEST_F(CacheFile, TakesNoFileOfOtherFacts) {
  write();
  CacheEntry other = entry;
  other.facts[0].second = "2";
  EXPECT_EQ(why_not(other), "it is of another layout");
  other = entry;
  other.facts.emplace_back("shape", "[1]");
  EXPECT_EQ(why_not(other), "it is of another shape");
  other = entry;
  other.facts.pop_back();
  EXPECT_EQ(why_not(other), "it is of another number of bytes");
  other = entry;
  other.bytes += 64;
  EXPECT_EQ(why_not(other), "it is of another number of bytes");
}

TEST_F(CacheFile, TakesNoDamagedFile) {
  write();
  const std::string good = text_of_file(entry.path());
  const struct {
    const char* name;
    std::string text;
    std::string why;    // of map_entry, which does not read what is behind the head
    std::string check;  // of check_entry
  } cases[] = {
      {"empty", "", "it is cut short", "it is cut short"},
      {"cut in the head", good.substr(0, 100), "it is cut short", "it is cut short"},
      {"the head alone", good.substr(0, 4096), "it has 4096 bytes of 10496",
       "it is not as long as it says"},
      {"cut", good.substr(0, good.size() - 1), "it has 10495 bytes of 10496",
       "it is not as long as it says"},
      {"longer", good + "x", "it has 10497 bytes of 10496", "it is not as long as it says"},
      {"another kind of file", std::string(good.size(), 'x'),
       "it is no file of this cache, or of another version",
       "it is no file of this cache, or of another version"},
      {"zeros", std::string(good.size(), '\0'),
       "it is no file of this cache, or of another version",
       "it is no file of this cache, or of another version"},
  };
  for (const auto& one : cases) {
    SCOPED_TRACE(one.name);
    write_text(entry.path(), one.text);
    EXPECT_EQ(why_not(entry), one.why);
    EXPECT_EQ(check_entry(entry.path()), one.check);
  }
  // Every byte of the head counts.
  for (std::size_t at = 0; at < 4096; ++at) {
    std::string text = good;
    text[at] = static_cast<char>(text[at] ^ 1);
    write_text(entry.path(), text);
    ASSERT_NE(why_not(entry), "") << at;
    ASSERT_NE(check_entry(entry.path()), "") << at;
  }
  // So does every byte behind it for who reads them.
  for (std::size_t at = 4096; at < good.size(); at += 37) {
    std::string text = good;
    text[at] = static_cast<char>(text[at] ^ 64);
    write_text(entry.path(), text);
    ASSERT_EQ(check_entry(entry.path()), "its bytes are not those that were written") << at;
  }
  fs::remove(entry.path());
  fs::create_directory(entry.path());
  EXPECT_EQ(why_not(entry), "it is no regular file");
  EXPECT_THROW(check_entry(entry.folder / "nothing"), IoError);
}

TEST_F(CacheFile, ANamedPipeIsNotWaitedFor) {
  ASSERT_EQ(::mkfifo(entry.path().c_str(), 0600), 0);
  EXPECT_EQ(why_not(entry), "it is no regular file");
}

TEST_F(CacheFile, AWriterThatStopsLeavesNothing) {
  const auto lock = FolderLock::take(entry.folder);
  {
    EntryWriter writer(entry, *lock);
    writer.write(std::span(bytes).first(640));
    EXPECT_EQ(files(), 1U);
    EXPECT_EQ(why_not(entry), "there is none");
  }
  EXPECT_EQ(files(), 0U);
  EntryWriter writer(entry, *lock);
  EXPECT_THROW(writer.finish(), FormatError);  // without its bytes
  EXPECT_EQ(why_not(entry), "there is none");
}

TEST_F(CacheFile, AnInterruptedWriterLeavesNothing) {
  const auto lock = FolderLock::take(entry.folder);
  {
    const Interrupt interrupt([] { return true; });
    std::this_thread::sleep_for(Interrupt::kInterval);
    EntryWriter writer(entry, *lock);
    EXPECT_THROW(writer.write(bytes), OperationCancelled);
  }
  EXPECT_EQ(files(), 0U);
}

TEST_F(CacheFile, WhatKilledWritersLeftIsRemoved) {
  write_text(entry.folder / ".one.panels.0123.tmp", "half");
  write_text(entry.folder / ".other.panels.0123.tmp", "half");
  write();
  EXPECT_EQ(files(), 2U);  // the entry, and what another entry's writer may be at
}

TEST_F(CacheFile, OneWriterAtATime) {
  const auto first = FolderLock::take(entry.folder);
  ASSERT_NE(first, nullptr);
  EXPECT_TRUE(first->exclusive());
  EXPECT_EQ(FolderLock::take(entry.folder), nullptr);
  const CacheEntry elsewhere{entry.folder / "sub", "two", {}, 64};
  fs::create_directories(elsewhere.folder);
  EXPECT_NE(FolderLock::take(elsewhere.folder), nullptr);
}

TEST_F(CacheFile, ALockEndsWithItsOwner) {
  FolderLock::take(entry.folder);
  EXPECT_NE(FolderLock::take(entry.folder), nullptr);
}

TEST_F(CacheFile, AForkedChildDoesNotKeepTheLock) {
  auto lock = FolderLock::take(entry.folder);
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  lock = nullptr;
  EXPECT_NE(FolderLock::take(entry.folder), nullptr);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

TEST_F(CacheFile, ReadersSeeWholeFilesWhileOthersWrite) {
  write();
  CacheEntry other = entry;
  other.facts[1].second = "4567";
  const std::vector<std::byte> others = noise(bytes.size(), 2);
  std::atomic<bool> done = false;
  std::thread writer([&] {
    for (int i = 0; i < 20; ++i) {
      write(i % 2 == 0 ? others : bytes, i % 2 == 0 ? other : entry);
    }
    done = true;
  });
  int found = 0;
  while (!done) {
    std::string why;
    if (const auto mapped = map_entry(entry, why); mapped != nullptr) {
      ASSERT_TRUE(std::equal(bytes.begin(), bytes.end(), mapped.get()));
      ++found;
    } else {
      ASSERT_EQ(why, "it is of another source file");
    }
  }
  writer.join();
  EXPECT_GT(found, 0);
}

TEST_F(CacheFile, FoldersThatAreNone) {
  write_text(entry.folder / "file", "");
  EXPECT_THROW(FolderLock::take(entry.folder / "file"), IoError);
  EXPECT_THROW(FolderLock::take(entry.folder / "nothing"), IoError);
}

TEST(CacheNames, AreNamesOfFiles) {
  EXPECT_EQ(file_name_of("blk.0.ffn_up_exps.weight"), "blk.0.ffn_up_exps.weight");
  EXPECT_EQ(file_name_of("../a b/\n"), ".._a_b__");
  EXPECT_EQ(file_name_of(std::string(300, 'a')).size(), 100U);
  EXPECT_EQ(hex_of(0xabcU), "0000000000000abc");
}

TEST(BlockHashes, DependOnEveryBitAndOnTheOrder) {
  const std::vector<std::byte> bytes = noise(640, 1);
  const auto hash_of = [](std::span<const std::byte> all) {
    BlockHash hash;
    hash.add(all);
    return hash.value();
  };
  const std::uint64_t whole = hash_of(bytes);
  for (std::size_t at = 0; at < bytes.size(); ++at) {
    for (int bit = 0; bit < 8; ++bit) {
      std::vector<std::byte> changed = bytes;
      changed[at] ^= static_cast<std::byte>(1 << bit);
      ASSERT_NE(hash_of(changed), whole) << at << ", bit " << bit;
    }
  }
  std::vector<std::byte> turned = bytes;
  std::rotate(turned.begin(), turned.begin() + 64, turned.end());
  EXPECT_NE(hash_of(turned), whole);
  EXPECT_NE(hash_of(std::span(bytes).first(576)), whole);
  const std::vector<std::byte> zeros(128);
  EXPECT_NE(hash_of(zeros), hash_of(std::span(zeros).first(64)));
}

}  // namespace
}  // namespace moesaic
