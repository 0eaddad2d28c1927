#include "moesaic/profile.hpp"

#include <set>
#include <string>
#include <thread>
#include <vector>

#include "gtest/gtest.h"

namespace moesaic {
namespace {

using std::chrono::nanoseconds;

TEST(Profile, NamesAreComplete) {
  std::set<std::string_view> names;
  for (int z = 0; z < static_cast<int>(Zone::Count); ++z) {
    EXPECT_TRUE(names.insert(name_of(static_cast<Zone>(z))).second);
  }
  EXPECT_STREQ(name_of(Zone::Sync), "sync");
  EXPECT_STREQ(name_of(Zone::GateUp), "gate_up");
  EXPECT_STREQ(name_of(Zone::Combine), "combine");
  EXPECT_STREQ(name_of(Zone::Upload), "upload");
  names.clear();
  for (int c = 0; c < static_cast<int>(Counter::Count); ++c) {
    EXPECT_TRUE(names.insert(name_of(static_cast<Counter>(c))).second);
  }
  EXPECT_STREQ(name_of(Counter::PaddedRows), "padded_rows");
  EXPECT_STREQ(name_of(Counter::NonfiniteRows), "nonfinite_rows");
  EXPECT_EQ(names.count(""), 0U);
}

TEST(Profile, ZonesAndCountersAddUp) {
  Profiler profiler;
  const auto start = std::chrono::steady_clock::now();
  profiler.add(Zone::Down, start, start + nanoseconds(1500));
  profiler.add(Zone::Down, start, start + nanoseconds(500));
  profiler.add(Counter::Pairs, 8);
  profiler.add(Counter::Pairs, 4);
  EXPECT_EQ(profiler.zone(Zone::Down).calls, 2);
  EXPECT_EQ(profiler.zone(Zone::Down).nanoseconds, 2000);
  EXPECT_EQ(profiler.zone(Zone::GateUp).calls, 0);
  EXPECT_EQ(profiler.counter(Counter::Pairs), 12);
  EXPECT_TRUE(profiler.events().empty());
  profiler.reset();
  EXPECT_EQ(profiler.zone(Zone::Down).calls, 0);
  EXPECT_EQ(profiler.counter(Counter::Pairs), 0);
}

TEST(Profile, ScopedZone) {
  Profiler profiler(true);
  {
    const ScopedZone zone(&profiler, Zone::Plan);
  }
  {
    const ScopedZone off(nullptr, Zone::Plan);
  }
  EXPECT_EQ(profiler.zone(Zone::Plan).calls, 1);
  ASSERT_EQ(profiler.events().size(), 1U);
  EXPECT_GE(profiler.events()[0].begin_ns, 0);
  EXPECT_GE(profiler.events()[0].end_ns, profiler.events()[0].begin_ns);
}

TEST(Profile, ThreadsAddWithoutLoss) {
  Profiler profiler(true);
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < 1000; ++n) {
        const ScopedZone zone(&profiler, Zone::Gather);
        profiler.add(Counter::Tokens, 1);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(profiler.zone(Zone::Gather).calls, 4000);
  EXPECT_EQ(profiler.counter(Counter::Tokens), 4000);
  std::set<std::uint64_t> ids;
  for (const auto& event : profiler.events()) ids.insert(event.thread);
  EXPECT_EQ(ids.size(), 4U);
}

TEST(Profile, ChromeTrace) {
  Profiler profiler(true);
  EXPECT_EQ(profiler.chrome_trace().find("\"name\""), std::string::npos);
  const auto start = std::chrono::steady_clock::now();
  profiler.add(Zone::Route, start, start + nanoseconds(1234567));
  profiler.add(Zone::Down, start, start + nanoseconds(5));
  profiler.add(Counter::Calls, 3);
  const std::string trace = profiler.chrome_trace();
  EXPECT_NE(trace.find(R"({"displayTimeUnit":"ns","traceEvents":[)"), std::string::npos) << trace;
  EXPECT_NE(trace.find(R"("name":"route","cat":"moesaic","ph":"X")"), std::string::npos) << trace;
  EXPECT_NE(trace.find(R"("dur":1234.567})"), std::string::npos) << trace;
  EXPECT_NE(trace.find(R"("dur":0.005})"), std::string::npos) << trace;
  EXPECT_NE(trace.find(R"("calls":3)"), std::string::npos) << trace;
  EXPECT_EQ(trace.find(",\n]"), std::string::npos) << "trailing comma";
  long depth = 0;
  for (const char c : trace) depth += c == '{' || c == '[' ? 1 : c == '}' || c == ']' ? -1 : 0;
  EXPECT_EQ(depth, 0);
}

}  // namespace
}  // namespace moesaic
