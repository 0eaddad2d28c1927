#include "moesaic/error.hpp"

#include <cerrno>

#include "gtest/gtest.h"

namespace moesaic {
namespace {

TEST(Error, FormatLeavesEmptyPartsOut) {
  EXPECT_EQ(format_problem({"moe_forward", "x", "[T, 64]", "[3, 63]", "transpose x"}),
            "moe_forward: x: expected [T, 64], got [3, 63] (transpose x)");
  EXPECT_EQ(format_problem({"moe_forward", "x", "[T, 64]", "", ""}),
            "moe_forward: x: expected [T, 64]");
  EXPECT_EQ(format_problem({"open", "a.gguf", "", "a directory", ""}),
            "open: a.gguf: got a directory");
  EXPECT_EQ(format_problem({"close", "", "", "", "try later"}), "close (try later)");
  EXPECT_EQ(format_problem({"", "layer", "", "", ""}), "layer");
  EXPECT_EQ(format_problem({}), "");
}

TEST(Error, RequireBuildsTheProblemOnFailureOnly) {
  bool built = false;
  const auto make = [&built] {
    built = true;
    return Problem{"op", "what", "e", "g", ""};
  };
  require<ShapeError>(true, make);
  EXPECT_FALSE(built);
  try {
    require<ShapeError>(false, make);
    FAIL() << "did not throw";
  } catch (const Error& error) {
    EXPECT_NE(dynamic_cast<const ShapeError*>(&error), nullptr);
    EXPECT_STREQ(error.what(), "op: what: expected e, got g");
  }
}

TEST(Error, IoErrorCarriesCodeAndPath) {
  const IoError error(ENOENT, "/no/such/file", "GgufFile::open");
  EXPECT_EQ(error.code(), ENOENT);
  EXPECT_EQ(error.path(), "/no/such/file");
  const std::string text = error.what();
  EXPECT_NE(text.find("GgufFile::open"), std::string::npos);
  EXPECT_NE(text.find("/no/such/file"), std::string::npos);
  EXPECT_NE(text.find("No such file"), std::string::npos) << text;
}

}  // namespace
}  // namespace moesaic
