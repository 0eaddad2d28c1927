#pragma once

/// What the tests of GGUF files share: a file that has a bit of everything, and a folder to write
/// files to and open them from.

#include <gtest/gtest.h>

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "gguf_exercise.hpp"
#include "gguf_writer.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::test {

inline constexpr GgufFile::Options kMapped{true};
inline constexpr GgufFile::Options kRead{false};
inline constexpr std::uint32_t kF32 = 0;

inline std::string text_of(const GgufBytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.bytes.data()), bytes.bytes.size()};
}

/// One entry of every value type and tensors of several kinds.
inline GgufWriter full_file() {
  GgufWriter file;
  file.string("general.architecture", "testmoe")
      .scalar<std::uint8_t>("t.u8", GgufType::U8, 200)
      .scalar<std::int8_t>("t.i8", GgufType::I8, -7)
      .scalar<std::uint16_t>("t.u16", GgufType::U16, 60000)
      .scalar<std::int16_t>("t.i16", GgufType::I16, -30000)
      .u32("t.u32", 4000000000u)
      .scalar<std::int32_t>("t.i32", GgufType::I32, -2000000000)
      .scalar<float>("t.f32", GgufType::F32, 1.5f)
      .scalar<std::uint8_t>("t.yes", GgufType::Bool, 1)
      .scalar<std::uint8_t>("t.no", GgufType::Bool, 0)
      .scalar<std::uint64_t>("t.u64", GgufType::U64, 1ull << 40)
      .scalar<std::uint64_t>("t.huge", GgufType::U64, ~0ull)
      .scalar<std::int64_t>("t.i64", GgufType::I64, -(1ll << 40))
      .scalar<double>("t.f64", GgufType::F64, 2.25)
      .array<std::uint32_t>("t.top_k", GgufType::U32, {2, 0, 8})
      .array<float>("t.limits", GgufType::F32, {0.5f, 7.0f})
      .array<std::int8_t>("t.bytes", GgufType::I8, {-1, 1})
      .array<std::uint8_t>("t.flags", GgufType::Bool, {1, 0, 1})
      .array<std::uint64_t>("t.huges", GgufType::U64, {1, ~0ull})
      .array<double>("t.none", GgufType::F64, {})
      .strings("t.tokens", {"a", "", std::string("nul\0in", 6), "\xff\xfe"});
  file.filled("blk.0.ffn_gate_inp.weight", QuantType::F32, {4, 32})
      .filled("blk.0.ffn_up_exps.weight", QuantType::Q4_0, {4, 3, 32})
      .filled("blk.0.ffn_down_exps.weight", QuantType::Q8_0, {4, 32, 32})
      .filled("scalar", QuantType::F32, {1})
      .filled("four", QuantType::F16, {2, 3, 1, 5})
      .tensor("empty", {32, 0, 7}, 2, "")
      .tensor("no dims", {}, kF32, "abcd");
  return file;
}

class GgufTest : public ::testing::Test {
 protected:
  std::shared_ptr<GgufFile> open(std::string_view bytes, GgufFile::Options options = kMapped) {
    return GgufFile::open(dir_.write("test.gguf", bytes), options);
  }

  /// Opening must fail, in both modes, with a message that has all of `parts` and the path.
  void expect_refused(std::string_view bytes, const std::vector<std::string>& parts) {
    for (const auto options : {kMapped, kRead}) {
      try {
        open(bytes, options);
        ADD_FAILURE() << "accepted; wanted " << parts.front();
      } catch (const FormatError& error) {
        const std::string message = error.what();
        EXPECT_NE(message.find("test.gguf"), std::string::npos) << message;
        for (const std::string& part : parts) {
          EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
        }
      }
    }
  }

  TempDir dir_;
};

}  // namespace moesaic::test
