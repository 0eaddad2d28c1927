// The word that was most likely meant (base/nearest.hpp).

#include "base/nearest.hpp"

#include <string>
#include <string_view>

#include "gtest/gtest.h"

namespace moesaic {
namespace {

constexpr std::string_view kTypes[] = {"f32", "f16", "bf16", "i64", "u8"};
constexpr std::string_view kQuants[] = {"F32", "Q4_0", "Q4_K", "Q5_K", "IQ4_XS"};
constexpr std::string_view kNames[] = {"top_k", "routing", "router", "memory_limit"};

TEST(Nearest, CountsEdits) {
  EXPECT_EQ(edit_distance("", ""), 0U);
  EXPECT_EQ(edit_distance("abc", ""), 3U);
  EXPECT_EQ(edit_distance("kitten", "sitting"), 3U);
}

TEST(Nearest, FindsAnotherCase) {
  EXPECT_EQ(nearest_word("q4_k", kQuants), "Q4_K");
  EXPECT_EQ(nearest_word("Q4K", kQuants), "Q4_K");
  EXPECT_EQ(nearest_word("iq4-xs", kQuants), "IQ4_XS");
}

TEST(Nearest, FindsTypesAsOtherPackagesSpellThem) {
  EXPECT_EQ(nearest_word("float32", kTypes), "f32");
  EXPECT_EQ(nearest_word("torch.bfloat16", kTypes), "bf16");
  EXPECT_EQ(nearest_word("half", kTypes), "f16");
  EXPECT_EQ(nearest_word("np.int64", kTypes), "i64");
  EXPECT_EQ(nearest_word("UINT8", kTypes), "u8");
}

TEST(Nearest, FindsMisspeltAndShortenedNames) {
  EXPECT_EQ(nearest_word("topk", kNames), "top_k");
  EXPECT_EQ(nearest_word("rooting", kNames), "routing");
  EXPECT_EQ(nearest_word("memory", kNames), "memory_limit");
}

TEST(Nearest, PassesByWordsThatAreInOthersByChance) {
  constexpr std::string_view kWords[] = {"out", "return_routing", "activation"};
  EXPECT_EQ(nearest_word("return_router", kWords), "return_routing");
  EXPECT_EQ(nearest_word("act", kWords), "activation");
}

TEST(Nearest, FindsNothingWhereNothingIsClose) {
  for (const std::string_view text : {"", "zzzzzz", "precision"})
    EXPECT_EQ(nearest_word(text, kNames), "") << text;
  EXPECT_EQ(nearest_word(std::string(100000, 'r'), kNames), "");
  EXPECT_EQ(nearest_hint("zzzzzz", kNames), "");
  EXPECT_EQ(nearest_hint("topk", kNames), "nearest: top_k");
}

TEST(Nearest, CutsLongWordsBetweenCharacters) {
  EXPECT_EQ(quoted_word("abc"), "'abc'");
  EXPECT_EQ(quoted_word(std::string(50, 'a')), "'" + std::string(40, 'a') + "...'");
  std::string umlauts;
  for (int i = 0; i < 50; ++i) umlauts += "\u00e4";
  EXPECT_EQ(quoted_word("a" + umlauts), "'a" + umlauts.substr(0, 38) + "...'");
}

}  // namespace
}  // namespace moesaic
