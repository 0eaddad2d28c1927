#include "cpu/isa.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <set>
#include <sstream>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/tuning.hpp"

namespace moesaic::cpu {
namespace {

constexpr CpuIsa kConcrete[] = {CpuIsa::Scalar,     CpuIsa::Avx2, CpuIsa::AvxVnni,
                                CpuIsa::Avx512Vnni, CpuIsa::Amx,  CpuIsa::Neon};

/// The flags that the kernel found, by itself and with the state it saves.
std::set<std::string> cpuinfo_flags() {
  std::set<std::string> flags;
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (!line.starts_with("flags") && !line.starts_with("Features")) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::string word;
    while (words >> word) flags.insert(word);
    break;
  }
  return flags;
}

TEST(Isa, AgreesWithTheKernelsFlags) {
  const std::set<std::string> flags = cpuinfo_flags();
  if (flags.empty()) GTEST_SKIP() << "no /proc/cpuinfo";
#ifdef __aarch64__
  // Every 64-bit Arm has it.
  if (!flags.contains("asimd")) GTEST_SKIP() << "/proc/cpuinfo is of the emulator's host";
#endif
  const auto all = [&](std::initializer_list<const char*> names) {
    return std::ranges::all_of(names, [&](const char* name) { return flags.contains(name); });
  };
  const bool avx2 = all({"avx2", "fma", "f16c"});
  EXPECT_EQ(cpu_has(CpuIsa::Avx2), avx2);
  EXPECT_EQ(cpu_has(CpuIsa::AvxVnni), avx2 && all({"avx_vnni"}));
  const bool avx512vnni =
      avx2 && all({"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"});
  EXPECT_EQ(cpu_has(CpuIsa::Avx512Vnni), avx512vnni);
  // Linux may have reasons of its own to refuse, which it gives.
  EXPECT_EQ(cpu_has(CpuIsa::Amx) || !amx_refusal().empty(),
            avx512vnni && all({"amx_tile", "amx_int8"}));
  EXPECT_EQ(cpu_has(CpuIsa::Neon), all({"asimddp", "asimdhp", "i8mm"}));
}

TEST(Isa, ScalarAlwaysRuns) {
  EXPECT_TRUE(supported(CpuIsa::Scalar));
  ASSERT_FALSE(supported_isas().empty());
  EXPECT_EQ(supported_isas().front(), CpuIsa::Scalar);
}

// In the runs per instruction set this proves that the kernels of that set run.
TEST(Isa, AutoIsWhatTheEnvironmentForcesElseTheBestSupported) {
  const CpuIsa forced = Tuning::process().cpu_isa;
  EXPECT_EQ(active_isa(Tuning{}), forced == CpuIsa::Auto ? best_isa() : forced);
  EXPECT_TRUE(supported(best_isa()));
  EXPECT_EQ(supported_isas().back(), best_isa());
}

TEST(Isa, ForcedRunsOrIsRefused) {
  for (const CpuIsa isa : kConcrete) {
    Tuning tuning;
    tuning.cpu_isa = isa;
    if (supported(isa)) {
      EXPECT_EQ(active_isa(tuning), isa) << name_of(isa);
      continue;
    }
    try {
      active_isa(tuning);
      FAIL() << name_of(isa) << " was accepted";
    } catch (const UnsupportedError& error) {
      EXPECT_NE(std::string(error.what()).find(name_of(isa)), std::string::npos);
    }
  }
}

TEST(Isa, OneNeverRunsEverywhere) {
  // No CPU has both families, so one of the refusals above is always tested.
  EXPECT_FALSE(cpu_has(CpuIsa::Neon) && cpu_has(CpuIsa::Avx2));
}

TEST(Isa, NamesAreDistinct) {
  std::set<std::string> names{name_of(CpuIsa::Auto)};
  for (const CpuIsa isa : kConcrete) names.insert(name_of(isa));
  EXPECT_EQ(names.size(), 7U);
}

}  // namespace
}  // namespace moesaic::cpu
