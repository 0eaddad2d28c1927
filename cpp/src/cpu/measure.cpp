#include "moesaic/measure.hpp"

#include <atomic>
#include <chrono>

#include "cpu/isa.hpp"
#include "cpu/peak.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic {
namespace {

double seconds_since(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

/// Keeps several sums, so that loads and not one chain of additions set the pace.
std::uint64_t sum_words(const std::uint64_t* words, std::size_t count) {
  constexpr std::size_t kLanes = 16;
  std::uint64_t lanes[kLanes] = {};
  for (std::size_t i = 0; i + kLanes <= count; i += kLanes) {
    for (std::size_t j = 0; j < kLanes; ++j) lanes[j] += words[i + j];
  }
  std::uint64_t total = 0;
  for (const std::uint64_t lane : lanes) total += lane;
  return total;
}

using DotPeak = std::int64_t (*)(std::int64_t);

DotPeak dot_peak_of(CpuIsa isa) {
  switch (isa) {
#ifdef MOESAIC_HAVE_AMX
    case CpuIsa::Amx:
      return cpu::amx::dot_peak;
#endif
#ifdef MOESAIC_HAVE_AVX512VNNI
    case CpuIsa::Avx512Vnni:
      return cpu::avx512vnni::dot_peak;
#endif
#ifdef MOESAIC_HAVE_AVXVNNI
    case CpuIsa::AvxVnni:
      return cpu::avxvnni::dot_peak;
#endif
#ifdef MOESAIC_HAVE_AVX2
    case CpuIsa::Avx2:
      return cpu::avx2::dot_peak;
#endif
#ifdef MOESAIC_HAVE_NEON
    case CpuIsa::Neon:
      return cpu::neon::dot_peak;
#endif
    default:
      return cpu::scalar::dot_peak;
  }
}

}  // namespace

double measure_bandwidth(ThreadPool& pool, const std::byte* buffer, std::size_t bytes) {
  constexpr std::size_t kChunk = std::size_t{4} << 20;
  const auto chunks = static_cast<std::int64_t>(bytes / kChunk);
  std::atomic<std::uint64_t> sink{0};
  const auto begin = std::chrono::steady_clock::now();
  pool.parallel_for(chunks, [&](std::int64_t chunk, int) {
    const auto* words =
        reinterpret_cast<const std::uint64_t*>(buffer + static_cast<std::size_t>(chunk) * kChunk);
    sink.fetch_add(sum_words(words, kChunk / sizeof(std::uint64_t)), std::memory_order_relaxed);
  });
  return static_cast<double>(chunks) * kChunk / seconds_since(begin);
}

double measure_dot_peak(ThreadPool& pool, CpuIsa isa) {
  Tuning tuning;
  tuning.cpu_isa = isa;
  const DotPeak run = dot_peak_of(cpu::active_isa(tuning));
  constexpr double kSliceSeconds = 2e-3;
  std::int64_t rounds = 1000;
  auto begin = std::chrono::steady_clock::now();
  run(rounds);
  rounds = static_cast<std::int64_t>(1000 * kSliceSeconds / (seconds_since(begin) + 1e-9)) + 1;
  const std::int64_t slices = std::int64_t{8} * pool.threads();
  std::atomic<std::int64_t> operations{0};
  begin = std::chrono::steady_clock::now();
  pool.parallel_for(slices, [&](std::int64_t, int) {
    operations.fetch_add(run(rounds), std::memory_order_relaxed);
  });
  return static_cast<double>(operations.load()) / seconds_since(begin);
}

}  // namespace moesaic
