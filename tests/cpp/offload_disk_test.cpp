// The disk tier alone, with reads that the test controls.

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#include "moesaic/error.hpp"
#include "offload/source.hpp"

namespace moesaic::offload {
namespace {

constexpr std::int32_t kExperts = 12;
constexpr std::int64_t kRole = 3000;  // not a multiple of the alignment

/// Byte at any place of the imaginary file.
std::byte byte_at(std::uint64_t offset) { return std::byte(offset * 37 % 251); }

std::vector<std::vector<ExpertRanges>> make_ranges(std::int64_t role_bytes = kRole) {
  std::vector<std::vector<ExpertRanges>> ranges(2);
  std::uint64_t at = 11;
  for (auto& layer : ranges) {
    for (std::int32_t e = 0; e < kExperts; ++e) {
      ExpertRanges& expert = layer.emplace_back(3);
      for (FileRange& range : expert) {
        range = {0, at, role_bytes};
        at += static_cast<std::uint64_t>(role_bytes) + 5;
      }
    }
  }
  return ranges;
}

void fill(std::uint64_t offset, std::span<std::byte> out) {
  for (std::size_t i = 0; i < out.size(); ++i) out[i] = byte_at(offset + i);
}

void expect_expert(const ExpertBytes& bytes, std::int32_t layer, std::int32_t expert) {
  const ExpertRanges ranges =
      make_ranges()[static_cast<std::size_t>(layer)][static_cast<std::size_t>(expert)];
  for (std::size_t role = 0; role < 3; ++role) {
    for (const std::int64_t i : {std::int64_t{0}, kRole / 2, kRole - 1}) {
      ASSERT_EQ(bytes[role][i], byte_at(ranges[role].offset + static_cast<std::uint64_t>(i)));
    }
  }
}

const ReadFn kGood = [](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
  fill(offset, out);
};

TEST(DiskSource, ReadsExpertsAndKeepsTheLatest) {
  const auto source = make_disk_source(make_ranges(), kGood, {4, 2});
  for (int round = 0; round < 3; ++round) {
    for (std::int32_t e = 0; e + 2 < kExperts; e += 2) {
      const std::int32_t experts[] = {e, e + 2};
      const auto batch = source->open(round % 2, experts);
      expect_expert(batch->wait(0), round % 2, e);
      expect_expert(batch->wait(1), round % 2, e + 2);
    }
  }
  const IoStats stats = source->stats();
  EXPECT_EQ(stats.cached, 3 * 4);  // the second of each pair is the first of the next
  EXPECT_EQ(stats.reads, 3 * 3 * 6);
  EXPECT_EQ(stats.bytes, stats.reads * kRole);
  EXPECT_GE(source->nbytes(), 4 * 3 * kRole);
}

TEST(DiskSource, KeepsSeveralRequestsInFlight) {
  std::mutex mutex;
  std::condition_variable all_here;
  int here = 0;
  // No read returns before six of them are under way.
  const ReadFn read = [&](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
    std::unique_lock lock(mutex);
    ++here;
    all_here.notify_all();
    all_here.wait_for(lock, std::chrono::seconds(20), [&] { return here >= 6; });
    fill(offset, out);
  };
  const auto source = make_disk_source(make_ranges(), read, {4, 6});
  const std::int32_t experts[] = {3, 7};
  const auto batch = source->open(0, experts);
  expect_expert(batch->wait(1), 0, 7);
  expect_expert(batch->wait(0), 0, 3);
  EXPECT_EQ(source->stats().most_in_flight, 6);
}

/// Gives up and down as the sum of their pieces' first bytes, gate as it was read.
class Adding final : public ExpertDecoder {
 public:
  std::int64_t nbytes() const override { return 2; }
  ExpertBytes decode(std::int32_t expert, const PieceBytes& pieces, std::byte* to) const override {
    ++calls;
    if (expert == bad) throw FormatError(Problem{"test", "expert", "another", "this", {}});
    to[0] = std::byte(std::to_integer<int>(pieces[0][0]) + std::to_integer<int>(pieces[1][0]));
    to[1] = std::byte(std::to_integer<int>(pieces[1][0]) + std::to_integer<int>(pieces[2][0]));
    return {pieces[0], to, to + 1};
  }
  mutable std::atomic<int> calls{0};
  std::int32_t bad = -1;
};

TEST(DiskSource, DecodesWhatItRead) {
  const auto decoder = std::make_shared<Adding>();
  decoder->bad = 7;
  const DiskOptions options{4, 3};
  const auto source = make_disk_source(make_ranges(), kGood, options, {decoder, decoder});
  EXPECT_EQ(source->nbytes(), disk_buffer_bytes(make_ranges(), options, {decoder, decoder}));
  EXPECT_GE(source->nbytes(), disk_buffer_bytes(make_ranges(), options) + 4 * 2);
  const auto first_of = [](std::int32_t expert, std::size_t piece) {
    return std::to_integer<int>(
        byte_at(make_ranges()[1][static_cast<std::size_t>(expert)][piece].offset));
  };
  const std::int32_t experts[] = {2, 5};
  {
    const auto batch = source->open(1, experts);
    for (std::size_t i = 0; i < 2; ++i) {
      const ExpertBytes bytes = batch->wait(i);
      const std::int32_t e = experts[i];
      EXPECT_EQ(bytes[0][1], byte_at(make_ranges()[1][static_cast<std::size_t>(e)][0].offset + 1));
      EXPECT_EQ(bytes[1][0], std::byte(first_of(e, 0) + first_of(e, 1)));
      EXPECT_EQ(bytes[2][0], std::byte(first_of(e, 1) + first_of(e, 2)));
    }
  }
  source->open(1, experts)->wait(1);
  EXPECT_EQ(decoder->calls, 2);  // what is in a buffer is decoded
  const std::int32_t with_bad[] = {7, 5};
  const auto batch = source->open(1, with_bad);
  EXPECT_THROW(batch->wait(0), FormatError);
  batch->wait(1);
}

TEST(DiskSource, LargeExpertsAreCutIntoPieces) {
  const auto source = make_disk_source(make_ranges((std::int64_t{2} << 20) + 100), kGood, {2, 4});
  const std::int32_t experts[] = {1};
  source->open(0, experts)->wait(0);
  EXPECT_EQ(source->stats().reads, 15);
}

TEST(DiskSource, AnErrorIsThatOfItsExpertAndDoesNotStay) {
  std::atomic<bool> broken{true};
  const std::uint64_t bad = make_ranges()[0][5][1].offset;
  const ReadFn read = [&](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
    if (broken && offset == bad) throw IoError(5, "disk", "read");
    fill(offset, out);
  };
  const auto source = make_disk_source(make_ranges(), read, {3, 2});
  const std::int32_t experts[] = {4, 5};
  {
    const auto batch = source->open(0, experts);
    expect_expert(batch->wait(0), 0, 4);
    EXPECT_THROW(batch->wait(1), IoError);
  }
  broken = false;
  const auto batch = source->open(0, experts);
  expect_expert(batch->wait(1), 0, 5);
}

TEST(DiskSource, AReadThatSomebodyElseBeganMayFail) {
  std::atomic<int> reads{0};
  std::atomic<bool> failing{false};
  const ReadFn read = [&](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
    if (reads++ < 3) {
      while (!failing) std::this_thread::yield();
      throw IoError(5, "disk", "read");
    }
    fill(offset, out);
  };
  const auto source = make_disk_source(make_ranges(), read, {3, 3});
  const std::int32_t experts[] = {5};
  const auto first = source->open(0, experts);
  const auto second = source->open(0, experts);
  failing = true;
  EXPECT_THROW(first->wait(0), IoError);
  expect_expert(second->wait(0), 0, 5);
  EXPECT_EQ(reads, 6);
}

TEST(DiskSource, WhatIsExpectedIsThere) {
  const auto source = make_disk_source(make_ranges(), kGood, {8, 2});
  const std::int32_t likely[] = {1, 2, 3, 4, 5, 6};
  source->expect(1, likely, Expect::Told);
  EXPECT_EQ(source->stats().ahead, 4);  // at most half of the buffers
  while (source->stats().reads < 4 * 3) std::this_thread::yield();
  const std::int32_t experts[] = {2, 9};
  const auto batch = source->open(1, experts);
  expect_expert(batch->wait(0), 1, 2);
  expect_expert(batch->wait(1), 1, 9);
  const IoStats stats = source->stats();
  EXPECT_EQ(stats.ahead_used, 1);
  EXPECT_EQ(stats.reads, 5 * 3);
}

// One thread is held inside a read ahead; what is asked for then goes before the rest of the queue.
TEST(DiskSource, NeedGoesBeforeGuesses) {
  std::mutex mutex;
  std::condition_variable changed;
  bool open = false;
  std::vector<std::uint64_t> order;
  const ReadFn read = [&](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
    std::unique_lock lock(mutex);
    order.push_back(offset);
    changed.notify_all();
    changed.wait(lock, [&] { return open; });
    fill(offset, out);
  };
  const auto source = make_disk_source(make_ranges(), read, {8, 1});
  const std::int32_t likely[] = {1, 2, 3};
  source->expect(0, likely, Expect::Guessed);
  {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return order.size() == 1; });
  }
  const std::int32_t needed[] = {7, 2};
  const auto batch = source->open(0, needed);
  {
    const std::lock_guard lock(mutex);
    open = true;
  }
  changed.notify_all();
  expect_expert(batch->wait(0), 0, 7);
  expect_expert(batch->wait(1), 0, 2);
  const auto ranges = make_ranges();
  const std::lock_guard lock(mutex);
  // Expert 2 was queued already; both come before expert 3 and the rest of expert 1, which were
  // dropped.
  ASSERT_EQ(order.size(), 7U);
  EXPECT_EQ(order[0], ranges[0][1][0].offset);
  for (const std::uint64_t offset : order) {
    EXPECT_NE(offset, ranges[0][3][0].offset);
    EXPECT_NE(offset, ranges[0][1][1].offset);
  }
}

// Reads past the page cache begin and end at whole blocks, in the file and in memory.
TEST(DiskSource, AlignedReadsBringTheSameBytes) {
  constexpr std::int64_t kBlock = 512;
  std::atomic<int> unaligned{0};
  const ReadFn read = [&](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
    const bool aligned = offset % kBlock == 0 && out.size() % kBlock == 0 &&
                         reinterpret_cast<std::uintptr_t>(out.data()) % kBlock == 0;
    if (!aligned) ++unaligned;
    fill(offset, out);
  };
  const DiskOptions options{3, 2, kBlock};
  const auto source = make_disk_source(make_ranges(), read, options);
  for (std::int32_t e = 0; e + 1 < kExperts; ++e) {
    const std::int32_t experts[] = {e, e + 1};
    const auto batch = source->open(1, experts);
    expect_expert(batch->wait(0), 1, e);
    expect_expert(batch->wait(1), 1, e + 1);
  }
  EXPECT_EQ(unaligned, 0);
  EXPECT_EQ(source->nbytes(), disk_buffer_bytes(make_ranges(), options));
}

TEST(DiskSource, WhatIsNeededGoesBeforeWhatWasTold) {
  std::mutex mutex;
  std::condition_variable changed;
  bool open = false;
  std::vector<std::uint64_t> order;
  const ReadFn read = [&](std::uint32_t, std::uint64_t offset, std::span<std::byte> out) {
    std::unique_lock lock(mutex);
    order.push_back(offset);
    changed.wait(lock, [&] { return open; });
    fill(offset, out);
  };
  const auto source = make_disk_source(make_ranges(), read, {8, 1});
  const std::int32_t told[] = {1, 2}, needed[] = {7, 8};
  source->expect(0, told, Expect::Told);
  source->expect(1, needed, Expect::Needed);
  {
    const std::lock_guard lock(mutex);
    open = true;
  }
  changed.notify_all();
  // The rest of what was told stays queued: there are buffers enough.
  const auto batch = source->open(1, needed);
  expect_expert(batch->wait(1), 1, 8);
  while (source->stats().reads < 4 * 3) std::this_thread::yield();
  const std::lock_guard lock(mutex);
  const auto at = [&](std::int32_t layer, std::size_t expert) {
    const std::uint64_t offset = make_ranges()[static_cast<std::size_t>(layer)][expert][2].offset;
    return std::ranges::find(order, offset) - order.begin();
  };
  EXPECT_LT(at(1, 8), at(0, 1));
  EXPECT_LT(at(1, 8), at(0, 2));
}

TEST(DiskSource, GuessesThatNobodyUsesAreNoLongerRead) {
  const auto source = make_disk_source(make_ranges(), kGood, {4, 2});
  const auto play = [&](std::int32_t guess, std::int32_t use) {
    const std::int32_t guesses[] = {guess}, uses[] = {use, (use + 1) % kExperts};
    const IoStats before = source->stats();
    source->expect(1, guesses, Expect::Guessed);
    // One that has not begun would be dropped, and nobody learnt what it was worth.
    const std::int64_t reads = before.reads + 3 * (source->stats().ahead - before.ahead);
    while (source->stats().reads < reads) std::this_thread::yield();
    for (const std::int32_t layer : {0, 1}) {
      const auto batch = source->open(layer, uses);
      batch->wait(0);
      batch->wait(1);
    }
  };
  for (std::int32_t i = 0; i < 60; ++i) play(3 * i % kExperts, 3 * i % kExperts);
  EXPECT_EQ(source->stats().ahead, 60);
  EXPECT_EQ(source->stats().ahead_used, 60);
  EXPECT_TRUE(source->stats().guessing);
  for (std::int32_t i = 0; i < 400; ++i) play((i + 5) % kExperts, i % kExperts);
  EXPECT_FALSE(source->stats().guessing);
  const std::int64_t before = source->stats().ahead;
  const std::int32_t guess[] = {9}, told[] = {9};
  source->expect(1, guess, Expect::Guessed);
  EXPECT_EQ(source->stats().ahead, before);
  source->open(0, guess)->wait(0);
  source->expect(1, told, Expect::Told);  // the caller may know better
  EXPECT_EQ(source->stats().ahead, before + 1);
}

TEST(DiskSource, ManyThreadsShareFewBuffers) {
  const auto source = make_disk_source(make_ranges(), kGood, {4, 3});
  std::vector<std::thread> threads;
  for (std::int32_t t = 0; t < 5; ++t) {
    threads.emplace_back([&, t] {
      for (std::int32_t i = 0; i < 200; ++i) {
        const std::int32_t experts[] = {(t + i) % kExperts, (t + i + 3) % kExperts,
                                        (t + 2 * i + 7) % kExperts};
        const bool distinct = experts[2] != experts[0] && experts[2] != experts[1];
        const auto batch =
            source->open(t % 2, std::span<const std::int32_t>(experts, distinct ? 3 : 2));
        expect_expert(batch->wait(1), t % 2, experts[1]);
        const std::int32_t next[] = {(t + i + 1) % kExperts};
        source->expect(t % 2, next, t % 3 == 0 ? Expect::Needed : Expect::Guessed);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace moesaic::offload
