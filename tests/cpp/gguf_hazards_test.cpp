// GGUF files that break the format in one place: each is refused with a message that names the
// field and the byte where it stands.

#include <gtest/gtest.h>

#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "gguf_fixture.hpp"

namespace moesaic::test {
namespace {

TEST_F(GgufTest, BadMagicAndVersions) {
  GgufWriter writer = full_file();
  writer.magic = "GGML";
  expect_refused(writer.bytes(), {"byte 0", "magic", "'GGML'"});
  expect_refused("version https://git-lfs.github.com/spec/v1\noid sha256:", {"Git LFS"});
  expect_refused("", {"magic", "truncated"});
  writer = full_file();
  for (const std::uint32_t version : {0u, 4u, 0x12345u}) {
    writer.version = version;
    expect_refused(writer.bytes(), {"byte 4", "version", "got " + std::to_string(version)});
  }
  writer.version = 1;
  expect_refused(writer.bytes(), {"byte 4", "version 1"});
  writer.version = 3u << 24;
  expect_refused(writer.bytes(), {"byte 4", "3, big-endian"});
}

TEST_F(GgufTest, CountsBeyondTheFile) {
  for (const std::uint64_t count : {~0ull, 1ull << 63, 1ull << 40, 1000ull}) {
    GgufWriter writer;
    writer.u32("a", 1);
    writer.tensor_count = count;
    expect_refused(writer.bytes(), {"byte 8", "tensor count", std::to_string(count)});
    writer.tensor_count.reset();
    writer.entry_count = count;
    expect_refused(writer.bytes(), {"byte 16", "metadata count", std::to_string(count)});
  }
}

TEST_F(GgufTest, BadKeys) {
  GgufWriter writer;
  writer.u32("same", 1).u32("other", 2).u32("same", 3);
  expect_refused(writer.bytes(), {"byte 65", "key 'same'", "unique"});
  expect_refused(GgufWriter().u32("", 1).bytes(), {"byte 24", "key 0", "a name"});
  expect_refused(GgufWriter().u32("a\nb", 1).bytes(), {"byte 24", "'a\\x0ab'"});
  expect_refused(GgufWriter().u32("a\xff", 1).bytes(), {"byte 24", "'a\\xff'"});
  expect_refused(GgufWriter().u32("\xed\xa0\x80", 1).bytes(), {"UTF-8"});
  expect_refused(GgufWriter().u32("\xe2\x82", 1).bytes(), {"UTF-8"});
  expect_refused(GgufWriter().u32(std::string(70000, 'k'), 1).bytes(),
                 {"byte 24", "key 0", "at most 65535", "70000"});
  EXPECT_EQ(open(GgufWriter().u32("prix \xe2\x82\xac", 7).bytes())->integer("prix \xe2\x82\xac"),
            7);
}

TEST_F(GgufTest, BadValues) {
  ByteWriter long_string;
  long_string.put<std::uint64_t>(~0ull - 3).raw("abc");
  expect_refused(GgufWriter().entry("k", GgufType::String, long_string).bytes(),
                 {"byte 37", "'k'", "string"});
  ByteWriter longer;
  longer.put<std::uint64_t>(4).raw("abc");
  expect_refused(GgufWriter().entry("k", GgufType::String, longer).bytes(),
                 {"byte 45", "'k'", "4 bytes", "3 bytes"});
  expect_refused(GgufWriter().scalar<std::uint8_t>("k", GgufType::Bool, 2).bytes(),
                 {"byte 37", "'k'", "bool", "got 2"});
  for (const std::uint32_t type : {13u, 255u, ~0u}) {
    GgufWriter writer;
    ByteWriter entry;
    entry.put<std::uint64_t>(0);
    // GgufType has a byte; write wider ids by hand.
    std::string bytes = writer.entry("k", GgufType::U64, entry).bytes();
    std::memcpy(bytes.data() + 33, &type, sizeof(type));
    expect_refused(bytes, {"byte 33", "'k': value type", "got " + std::to_string(type)});
  }
}

TEST_F(GgufTest, BadArrays) {
  const auto array = [](std::uint32_t element, std::uint64_t count, std::string_view rest) {
    ByteWriter bytes;
    bytes.put(element).put(count).raw(rest);
    return GgufWriter().entry("k", GgufType::Array, bytes).bytes();
  };
  expect_refused(array(9, 1, std::string(64, '\0')), {"byte 37", "'k'", "nested array"});
  expect_refused(array(13, 1, std::string(64, '\0')), {"byte 37", "array element type", "got 13"});
  for (const std::uint64_t count : {~0ull, 1ull << 61, (1ull << 62) + 1, 9ull}) {
    expect_refused(array(10, count, std::string(64, '\0')),
                   {"byte 41", "'k': array count", "at most 8", std::to_string(count)});
    expect_refused(array(8, count, std::string(64, '\0')),
                   {"byte 41", "'k': array count", "at most 8", std::to_string(count)});
  }
  std::string strings(16, '\0');
  strings[8] = 1;  // the second string wants a byte more than there is
  expect_refused(array(8, 2, strings), {"byte 65", "'k': array string", "truncated"});
}

TEST_F(GgufTest, BadAlignment) {
  for (const std::uint32_t value : {0u, 3u, 33u, ~0u}) {
    expect_refused(GgufWriter().u32("general.alignment", value).bytes(),
                   {"byte 53", "'general.alignment'", "a power of two", std::to_string(value)});
  }
  expect_refused(GgufWriter().scalar<std::uint64_t>("general.alignment", GgufType::U64, 32).bytes(),
                 {"byte 49", "'general.alignment'", "u32", "u64"});
  // The largest one is legal; its data section lies beyond this file.
  GgufWriter writer;
  writer.u32("general.alignment", 1u << 31);
  EXPECT_NO_THROW(open(writer.bytes()));
  writer.alignment = 1;
  writer.tensor("t", {1}, kF32, "abcd");
  expect_refused(writer.bytes(), {"'t': data", "2147483648"});
}

TEST_F(GgufTest, BadTensorNames) {
  GgufWriter writer;
  writer.filled("t", QuantType::F32, {8}).filled("t", QuantType::F32, {8});
  expect_refused(writer.bytes(), {"byte 57", "tensor 't'", "unique"});
  EXPECT_NO_THROW(open(GgufWriter().filled(std::string(63, 'n'), QuantType::F32, {1}).bytes()));
  expect_refused(GgufWriter().filled(std::string(64, 'n'), QuantType::F32, {1}).bytes(),
                 {"byte 24", "name of tensor 0", "at most 63", "64"});
  expect_refused(GgufWriter().filled("", QuantType::F32, {1}).bytes(), {"byte 24", "a name"});
  expect_refused(GgufWriter().filled(std::string("a\0b", 3), QuantType::F32, {1}).bytes(),
                 {"byte 24", "'a\\x00b'"});
}

TEST_F(GgufTest, BadDims) {
  const auto dims = [](const std::vector<std::int64_t>& ne, QuantType type = QuantType::F32) {
    return GgufWriter()
        .tensor("t", ne, static_cast<std::uint32_t>(type), std::string(64, 'x'))
        .bytes();
  };
  expect_refused(dims({1, 1, 1, 1, 1}), {"byte 33", "'t': n_dims", "at most 4", "got 5"});
  expect_refused(dims({16, -1}), {"byte 45", "'t': dim 1", "at least 0", "got -1"});
  expect_refused(dims({std::numeric_limits<std::int64_t>::min()}), {"byte 37", "dim 0"});
  expect_refused(dims({1ll << 62, 4}), {"byte 37", "'t': dims", "2^63 elements"});
  expect_refused(dims({1ll << 62, 2}), {"byte 37", "'t': dims", "2^63 elements"});
  expect_refused(dims({1ll << 32, 1ll << 32, 1ll << 32, 1ll << 32}), {"'t': dims"});
  expect_refused(dims({1ll << 62, 0, 1ll << 62}), {"'t': dims", "2^63 elements"});
  expect_refused(dims({1ll << 62, 0, 2}), {"'t': dims", "2^63 elements"});
  expect_refused(dims({1ll << 62}), {"'t': dims", "2^63 bytes"});
  expect_refused(dims({1ll << 60}), {"'t': data", "truncated"});
  expect_refused(dims({31, 2}, QuantType::Q4_0),
                 {"byte 37", "'t': innermost dim", "32 (one block of Q4_0)", "got 31"});
  expect_refused(dims({128}, QuantType::Q4_K), {"256 (one block of Q4_K)", "got 128"});
  std::string wide = dims({16});
  const std::uint32_t most = ~0u;
  std::memcpy(wide.data() + 33, &most, sizeof(most));
  expect_refused(wide, {"n_dims", "4294967295"});
}

TEST_F(GgufTest, UnknownTensorTypesAreRefusedByNameWhenTheyAreRead) {
  const std::string data(64, 'x');
  for (const std::uint32_t id :
       {4u, 5u, 31u, 33u, 36u, 37u, 38u, 43u, 97u, 138u, 240u, 255u, 256u, ~0u}) {
    const std::string remark(quant_id_remark(id));
    EXPECT_FALSE(remark.empty());
    for (const bool last : {false, true}) {
      GgufWriter writer;
      writer.tensor("a", {16}, kF32, data).tensor("t", {32, 3}, id, std::string(70, 'y'));
      if (!last) writer.tensor("z", {16}, kF32, data);
      const auto file = open(writer.bytes());
      const GgufTensor& tensor = *file->tensor("t");
      EXPECT_EQ(tensor.quant, QuantType::Unknown);
      EXPECT_EQ(tensor.type_id, id);
      EXPECT_EQ(tensor.shape_text(), "[3, 32]");
      EXPECT_GE(tensor.nbytes, 70u);
      EXPECT_LE(tensor.nbytes, 96u);  // with the padding
      EXPECT_EQ(file->bytes(*file->tensor("a")).bytes.size(), 64u);
      if (!last) {
        EXPECT_EQ(file->bytes(*file->tensor("z")).bytes.size(), 64u);
      }
      try {
        static_cast<void>(file->bytes(tensor));
        ADD_FAILURE() << id;
      } catch (const UnsupportedError& error) {
        const std::string text = error.what();
        for (const std::string& part : {std::string("'t'"), std::to_string(id), remark}) {
          EXPECT_NE(text.find(part), std::string::npos) << text;
        }
      }
    }
  }
}

TEST_F(GgufTest, BadOffsetsBesideUnknownTypes) {
  const std::string data(64, 'x');
  for (const std::uint64_t offset : {0ull, 32ull, 65ull, 1ull << 40, 1ull << 63, ~0ull}) {
    GgufWriter writer;
    writer.tensor("a", {16}, kF32, data)
        .tensor("t", {32}, 144, data)
        .tensor("z", {16}, kF32, data, offset);
    expect_refused(writer.bytes(), {"'z': offset", std::to_string(offset)});
  }
  // The data ends before the tensor begins.
  GgufWriter cut;
  cut.tensor("a", {16}, kF32, "").tensor("t", {32}, 144, "", 64);
  expect_refused(cut.bytes(), {"'a': data", "truncated"});
}

TEST_F(GgufTest, ShapesAsGgmlComparesThem) {
  struct Row {
    std::vector<std::int64_t> ne;
    std::initializer_list<std::int64_t> dims;
    bool same;
  };
  const Row rows[] = {
      {{4, 3}, {3, 4}, true},        {{4, 3, 1}, {3, 4}, true},  {{4, 3, 1, 1}, {3, 4}, true},
      {{4}, {1, 4}, true},           {{4}, {4}, true},           {{4, 1}, {4}, true},
      {{4, 3}, {1, 1, 3, 4}, true},  {{1}, {1}, true},           {{4, 3}, {4, 3}, false},
      {{1, 4}, {4}, false},          {{4, 3, 2}, {3, 4}, false}, {{4, 3}, {2, 3, 4}, false},
      {{4, 3, 1, 2}, {3, 4}, false}, {{4, 0}, {4}, false},
  };
  for (const Row& row : rows) {
    std::int64_t count = 1;
    for (const std::int64_t n : row.ne) count *= n;
    const std::string data(static_cast<std::size_t>(count) * 4, 'x');
    const auto file = open(GgufWriter().tensor("t", row.ne, kF32, data).bytes());
    const GgufTensor& tensor = *file->tensor("t");
    EXPECT_EQ(tensor.has_shape(row.dims), row.same) << tensor.shape_text();
  }
}

TEST_F(GgufTest, BadOffsets) {
  const std::string data(64, 'x');
  const auto second_at = [&](std::uint64_t offset) {
    return GgufWriter().tensor("a", {16}, kF32, data).tensor("b", {16}, kF32, data, offset).bytes();
  };
  EXPECT_NO_THROW(open(second_at(64)));
  for (const std::uint64_t offset :
       {0ull, 32ull, 65ull, 96ull, 1ull << 40, 1ull << 63, ~0ull, ~0ull - 31}) {
    expect_refused(second_at(offset),
                   {"byte 57", "'b': offset", "expected 64", "got " + std::to_string(offset)});
  }
  GgufWriter first;
  first.tensor("a", {16}, kF32, data, 32);
  expect_refused(first.bytes(), {"byte 24", "'a': offset", "expected 0", "got 32"});
}

}  // namespace
}  // namespace moesaic::test
