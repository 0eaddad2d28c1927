#include "moesaic/profile.hpp"

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <new>

namespace moesaic {
namespace {

/// A small number for the calling thread, in order of first use, because trace viewers read thread
/// ids as doubles.
std::uint64_t thread_number() {
  static std::atomic<std::uint64_t> next{0};
  thread_local const std::uint64_t number = next++;
  return number;
}

/// Nanoseconds as microseconds with three decimals, whatever the locale.
std::string microseconds(std::int64_t nanoseconds) {
  const std::int64_t value = std::max<std::int64_t>(nanoseconds, 0);
  std::string text = std::to_string(value / 1000);
  text += '.';
  for (std::int64_t power = 100; power > 0; power /= 10) {
    text += static_cast<char>('0' + value / power % 10);
  }
  return text;
}

}  // namespace

Profiler::Profiler(bool keep_events, bool waits)
    : start_(std::chrono::steady_clock::now()), keep_events_(keep_events), waits_(waits) {}

ZoneTotal Profiler::zone(Zone z) const {
  const std::lock_guard lock(mutex_);
  return zones_[static_cast<std::size_t>(z)];
}

std::int64_t Profiler::counter(Counter c) const {
  const std::lock_guard lock(mutex_);
  return counters_[static_cast<std::size_t>(c)];
}

void Profiler::add(Zone z, std::chrono::steady_clock::time_point begin,
                   std::chrono::steady_clock::time_point end) {
  const auto ns = [](std::chrono::steady_clock::duration d) {
    return std::chrono::duration_cast<std::chrono::nanoseconds>(d).count();
  };
  const std::lock_guard lock(mutex_);
  ZoneTotal& total = zones_[static_cast<std::size_t>(z)];
  ++total.calls;
  total.nanoseconds += ns(end - begin);
  if (!keep_events_) return;
  try {
    events_.push_back({z, ns(begin - start_), ns(end - start_), thread_number()});
  } catch (const std::bad_alloc&) {
    // Zones end in destructors; an event lost for want of memory must not end the program.
  }
}

void Profiler::add(Counter c, std::int64_t amount) {
  const std::lock_guard lock(mutex_);
  counters_[static_cast<std::size_t>(c)] += amount;
}

void Profiler::reset() {
  const std::lock_guard lock(mutex_);
  zones_ = {};
  counters_ = {};
  events_.clear();
  start_ = std::chrono::steady_clock::now();
}

std::vector<Profiler::Event> Profiler::events() const {
  const std::lock_guard lock(mutex_);
  return events_;
}

std::string Profiler::chrome_trace() const {
  std::string json;
  const auto append = [&json](std::initializer_list<std::string_view> parts) {
    for (const std::string_view part : parts) json += part;
  };
  std::string_view separator = "\n";
  append({R"({"displayTimeUnit":"ns","traceEvents":[)"});
  for (const Event& event : events()) {
    append({separator, R"({"name":")", name_of(event.zone), R"(","cat":"moesaic","ph":"X","pid":0)",
            R"(,"tid":)", std::to_string(event.thread), R"(,"ts":)", microseconds(event.begin_ns),
            R"(,"dur":)", microseconds(event.end_ns - event.begin_ns), "}"});
    separator = ",\n";
  }
  append({"\n", R"(],"otherData":{)"});
  separator = "";
  for (std::size_t i = 0; i < names_of<Counter>().size(); ++i) {
    const std::int64_t value = counter(static_cast<Counter>(i));
    append({separator, "\"", names_of<Counter>()[i], "\":", std::to_string(value)});
    separator = ",";
  }
  append({"}}\n"});
  return json;
}

}  // namespace moesaic
