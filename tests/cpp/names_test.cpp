// The table of words (moesaic/names.hpp): every enumeration, word by word.

#include "moesaic/names.hpp"

#include <array>
#include <cctype>
#include <set>
#include <string>
#include <string_view>
#include <utility>

#include "gtest/gtest.h"
#include "model/model.hpp"
#include "moesaic/moesaic.hpp"

namespace moesaic {
namespace {

template <class E>
class Names : public testing::Test {};

using Enumerations =
    testing::Types<DType, DeviceType, GgufType, ScoreFunction, SelectOn, GroupReduce, GroupMask,
                   NormGuard, WeightOn, RouterInput, ActivationKind, SharedKind, LayerKind,
                   LayerPart, Use, Role, WeightLayout, StackLayout, CheckpointFormat, Path,
                   RowSpace, Zone, Counter, GemmMode, RouteMode, RowSpaceMode, Precision,
                   ProfileMode, LogLevel, CpuIsa, Ranking, ExecMode, RefreshPolicy::Every, OnMiss>;
TYPED_TEST_SUITE(Names, Enumerations);

/// How the compiler prints `value`: by its name, or as a number in a cast where none is declared.
template <auto value>
constexpr std::string_view spelled() {
  std::string_view text = __PRETTY_FUNCTION__;
  text = text.substr(text.find("value = ") + 8);
  return text.substr(0, text.find_first_of(";]"));
}

/// Whether `value` is a declared enumerator other than `Count`.
template <auto value>
constexpr bool declared() {
  constexpr std::string_view text = spelled<value>();
  return text.find('(') == std::string_view::npos && !text.ends_with("::Count");
}

template <class E, std::size_t... values>
std::size_t count_declared(std::index_sequence<values...>) {
  return (std::size_t{0} + ... + declared<static_cast<E>(values)>());
}

/// Every enumerator has a word and every word an enumerator: those of 0 up to the number of words
/// are declared, and none of the next 16.
TYPED_TEST(Names, HaveNoGaps) {
  constexpr std::size_t kMany = 40;
  EXPECT_EQ(count_declared<TypeParam>(std::make_index_sequence<kMany>{}),
            names_of<TypeParam>().size());
  EXPECT_LE(names_of<TypeParam>().size() + 16, kMany);
}

TYPED_TEST(Names, GoThereAndBack) {
  std::set<std::string_view> seen;
  std::size_t count = 0;
  for (const std::string_view name : names_of<TypeParam>()) {
    EXPECT_TRUE(seen.insert(name).second) << name;
    EXPECT_FALSE(name.empty());
    const auto value = static_cast<TypeParam>(count++);
    EXPECT_EQ(name_of(value), name);
    EXPECT_EQ(find_name<TypeParam>(name), value);
    EXPECT_EQ(parse_name<TypeParam>(name, "call", "argument"), value);
  }
  EXPECT_STREQ(name_of(static_cast<TypeParam>(200)), "unknown");
}

TYPED_TEST(Names, UnknownWordsAreAnsweredWithTheKnownOnes) {
  EXPECT_FALSE(find_name<TypeParam>("").has_value());
  EXPECT_FALSE(find_name<TypeParam>("no such word").has_value());
  try {
    parse_name<TypeParam>("no such word", "call", "argument");
    FAIL() << "accepted";
  } catch (const ConfigError& error) {
    EXPECT_EQ(std::string(error.what()),
              "call: argument: expected " + list_names<TypeParam>(" | ") + ", got 'no such word'");
    for (const char* name : names_of<TypeParam>()) {
      EXPECT_NE(std::string_view(error.what()).find(name), std::string_view::npos);
    }
  }
}

TEST(NamesOf, SomeWords) {
  EXPECT_STREQ(name_of(DType::BF16), "bf16");
  EXPECT_STREQ(name_of(ActivationKind::SwiGluOai), "swiglu_oai");
  EXPECT_STREQ(name_of(CheckpointFormat::GptqV2), "gptq_v2");
  EXPECT_EQ(list_names<GroupReduce>(), "top2_sum|max");
}

}  // namespace
}  // namespace moesaic
