#include "moesaic/tuning.hpp"

#include <algorithm>
#include <cctype>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/env.hpp"
#include "gtest/gtest.h"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

using Variables = std::vector<std::pair<std::string, std::string>>;

Tuning from(const Variables& variables) {
  return Tuning::from_env(variables, [](const std::string& text) { ADD_FAILURE() << text; });
}

std::string error_of(const Variables& variables) {
  try {
    from(variables);
  } catch (const ConfigError& error) {
    return error.what();
  }
  return "";
}

TEST(Env, EveryKnob) {
  const Tuning t = from({{"MOESAIC_LOG", "debug"},
                         {"MOESAIC_PROFILE", "events"},
                         {"MOESAIC_BACKEND", "cpu"},
                         {"MOESAIC_CPU_ISA", "avx512vnni"},
                         {"MOESAIC_THREADS", "3"},
                         {"MOESAIC_GEMM", "aligned"},
                         {"MOESAIC_ROUTE", "device"},
                         {"MOESAIC_ROW_SPACE", "packed_rows"},
                         {"MOESAIC_PRECISION", "fast"},
                         {"MOESAIC_BATCH_INVARIANT", "on"},
                         {"MOESAIC_BLOCK_SIZE", "48"},
                         {"MOESAIC_LARGE_M_BLOCK_SIZE", "64"},
                         {"MOESAIC_LARGE_M_MIN_PAIRS", "5000000000"},
                         {"MOESAIC_NUMA", "4"},
                         {"MOESAIC_STRICT", "true"},
                         {"MOESAIC_POISON", "1"},
                         {"PATH", "/bin"}});
  Tuning want;
  want.log = LogLevel::Debug;
  want.profile = ProfileMode::Events;
  want.backend = "cpu";
  want.cpu_isa = CpuIsa::Avx512Vnni;
  want.threads = 3;
  want.numa.count = 4;
  want.gemm = GemmMode::Aligned;
  want.route = RouteMode::Device;
  want.row_space = RowSpaceMode::PackedRows;
  want.precision = Precision::Fast;
  want.batch_invariant = true;
  want.block_size = 48;
  want.large_m_block_size = 64;
  want.large_m_min_pairs = 5000000000;
  want.strict = true;
  want.poison = true;
  EXPECT_EQ(t, want);
}

TEST(Env, DefaultsAndSwitches) {
  EXPECT_EQ(from({}), Tuning{});
  EXPECT_EQ(from({{"MOESAIC_STRICT", "0"}, {"MOESAIC_POISON", "off"}}), Tuning{});
  EXPECT_EQ(from({{"MOESAIC_STRICT", "false"}}), Tuning{});
  EXPECT_EQ(from({{"MOESAIC_BLOCK_SIZE", "auto"}, {"MOESAIC_THREADS", "auto"}}), Tuning{});
  EXPECT_EQ(from({{"MOESAIC_BACKEND", "auto"}, {"MOESAIC_NUMA", "auto"}}), Tuning{});
  EXPECT_EQ(from({{"MOESAIC_NUMA", "off"}}), from({{"MOESAIC_NUMA", "1"}}));
  EXPECT_EQ(from({{"MOESAIC_GEMM", ""}}), Tuning{});  // an empty variable is an unset one
}

TEST(Env, BadValuesNameVariableAcceptedAndGiven) {
  EXPECT_EQ(error_of({{"MOESAIC_GEMM", "marlin"}}),
            "environment: MOESAIC_GEMM: expected auto|bucketed|aligned, got \"marlin\"");
  for (const auto& [variable, value] : Variables{{"MOESAIC_BLOCK_SIZE", "24"},
                                                 {"MOESAIC_BLOCK_SIZE", "-16"},
                                                 {"MOESAIC_BLOCK_SIZE", "16 "},
                                                 {"MOESAIC_BLOCK_SIZE", "0x10"},
                                                 {"MOESAIC_LARGE_M_BLOCK_SIZE", "17"},
                                                 {"MOESAIC_LARGE_M_MIN_PAIRS", "0"},
                                                 {"MOESAIC_LARGE_M_MIN_PAIRS", "1e3"},
                                                 {"MOESAIC_LARGE_M_MIN_PAIRS", "auto"},
                                                 {"MOESAIC_THREADS", "0"},
                                                 {"MOESAIC_THREADS", "99999999999"},
                                                 {"MOESAIC_THREADS", "two"},
                                                 {"MOESAIC_NUMA", "0"},
                                                 {"MOESAIC_NUMA", "65"},
                                                 {"MOESAIC_STRICT", "yes"},
                                                 {"MOESAIC_STRICT", "TRUE"},
                                                 {"MOESAIC_STRICT", "2"},
                                                 {"MOESAIC_POISON", "01"},
                                                 {"MOESAIC_CPU_ISA", "avx"},
                                                 {"MOESAIC_LOG", "Warn"},
                                                 {"MOESAIC_BACKEND", "cuda:0"},
                                                 {"MOESAIC_PROFILE", "1"}}) {
    const std::string text = error_of({{variable, value}});
    EXPECT_NE(text.find(variable), std::string::npos) << variable << "=" << value << ": " << text;
    EXPECT_NE(text.find("\"" + value + "\""), std::string::npos) << text;
  }
}

TEST(Env, UnknownNamesWarnWithTheNearest) {
  std::vector<std::string> warnings;
  const Tuning t = Tuning::from_env(Variables{{"MOESAIC_BLOKSIZE", "16"},
                                              {"MOESAIC_STRICT", "1"},
                                              {"MOESAIC_threads", "2"},
                                              {"OTHER", "x"}},
                                    [&](const std::string& text) { warnings.push_back(text); });
  EXPECT_TRUE(t.strict);
  EXPECT_FALSE(t.block_size.has_value());
  ASSERT_EQ(warnings.size(), 2U);
  EXPECT_EQ(warnings[0],
            "unknown environment variable MOESAIC_BLOKSIZE (nearest: MOESAIC_BLOCK_SIZE)");
  EXPECT_NO_THROW(Tuning::from_env(Variables{{"MOESAIC_NOTHING", "1"}}, nullptr));
}

TEST(Tuning, ProcessIsReadOnce) {
  const Tuning& first = Tuning::process();
  EXPECT_EQ(&first, &Tuning::process());
}

TEST(Tuning, Validate) {
  Tuning t;
  EXPECT_NO_THROW(t.validate());
  t.block_size = 24;
  EXPECT_THROW(t.validate(), ConfigError);
  t = {};
  t.large_m_block_size = 0;
  EXPECT_THROW(t.validate(), ConfigError);
  t = {};
  t.large_m_min_pairs = 0;
  EXPECT_THROW(t.validate(), ConfigError);
  t = {};
  t.threads = 0;
  EXPECT_THROW(t.validate(), ConfigError);
}

TEST(SetKnob, SetsOrLeavesAlone) {
  Tuning t;
  set_knob(t, "block_size", "32");
  EXPECT_EQ(t.block_size, 32);
  EXPECT_THROW(set_knob(t, "block_size", "33"), ConfigError);
  EXPECT_THROW(set_knob(t, "block_size", ""), ConfigError);
  EXPECT_EQ(t.block_size, 32);
  set_knob(t, "block_size", "auto");
  EXPECT_FALSE(t.block_size.has_value());
  try {
    set_knob(t, "blocksize", "32");
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    EXPECT_STREQ(error.what(), "tuning: blocksize: expected a known knob (nearest: block_size)");
  }
}

TEST(Knobs, TableIsConsistent) {
  std::set<std::string_view> names;
  for (const Knob& knob : knobs()) {
    EXPECT_TRUE(names.insert(knob.name).second) << knob.name;
    std::string variable = "MOESAIC_";
    for (const char c : knob.name) variable += static_cast<char>(std::toupper(c));
    EXPECT_EQ(knob.variable, variable);
    EXPECT_FALSE(knob.help.empty());
    Tuning t;  // a shown value can be given back
    EXPECT_TRUE(knob.set(t, knob.get(Tuning{}))) << knob.name;
    EXPECT_EQ(t, Tuning{}) << knob.name;
    // Every word of the help text is accepted and shown again.
    std::string_view rest = knob.accepted;
    if (rest.find('|') == std::string_view::npos) continue;
    while (!rest.empty()) {
      const std::string_view word = rest.substr(0, rest.find('|'));
      rest.remove_prefix(std::min(rest.size(), word.size() + 1));
      if (word.find("..") != std::string_view::npos) continue;
      EXPECT_TRUE(knob.set(t, word)) << knob.name << " " << word;
      Tuning again;
      EXPECT_TRUE(knob.set(again, knob.get(t))) << knob.name << " " << word;
      EXPECT_EQ(knob.get(again), knob.get(t)) << knob.name << " " << word;
    }
  }
  EXPECT_EQ(names.size(), 17U);
}

TEST(ShowConfig, ValueAndSource) {
  const Tuning environment = from({{"MOESAIC_GEMM", "bucketed"}, {"MOESAIC_STRICT", "1"}});
  Tuning effective = environment;
  effective.block_size = 64;
  effective.strict = false;
  const auto entries = show_config(effective, environment);
  EXPECT_EQ(entries.size(), knobs().size());
  const auto entry = [&](std::string_view knob) {
    for (const ConfigEntry& e : entries) {
      if (e.knob == knob) return e;
    }
    ADD_FAILURE() << "no entry " << knob;
    return ConfigEntry{};
  };
  EXPECT_EQ(entry("gemm").value, "bucketed");
  EXPECT_EQ(entry("gemm").source, "environment");
  EXPECT_EQ(entry("gemm").variable, "MOESAIC_GEMM");
  EXPECT_EQ(entry("block_size").value, "64");
  EXPECT_EQ(entry("block_size").source, "tuning");
  EXPECT_EQ(entry("strict").value, "off");
  EXPECT_EQ(entry("strict").source, "tuning");
  EXPECT_EQ(entry("threads").value, "auto");
  EXPECT_EQ(entry("threads").source, "default");
  EXPECT_EQ(entry("large_m_min_pairs").value, "1024");
}

}  // namespace
}  // namespace moesaic
