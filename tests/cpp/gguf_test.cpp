// Well-formed GGUF files: every value, array and tensor comes out as it was written.

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cerrno>
#include <filesystem>
#include <string>
#include <vector>

#include "gguf_fixture.hpp"

namespace moesaic::test {
namespace {

TEST_F(GgufTest, EveryValueType) {
  for (const std::uint32_t version : {2u, 3u}) {
    GgufWriter writer = full_file();
    writer.version = version;
    const auto file = open(writer.bytes());
    EXPECT_EQ(file->version(), version);
    EXPECT_EQ(file->file_bytes(), writer.bytes().size());
    EXPECT_EQ(file->metadata().size(), 21u);
    EXPECT_EQ(file->string("general.architecture"), "testmoe");
    EXPECT_EQ(file->integer("t.u8"), 200);
    EXPECT_EQ(file->integer("t.i8"), -7);
    EXPECT_EQ(file->integer("t.u16"), 60000);
    EXPECT_EQ(file->integer("t.i16"), -30000);
    EXPECT_EQ(file->integer("t.u32"), 4000000000);
    EXPECT_EQ(file->integer("t.i32"), -2000000000);
    EXPECT_EQ(file->integer("t.u64"), 1ll << 40);
    EXPECT_EQ(file->integer("t.i64"), -(1ll << 40));
    EXPECT_EQ(file->number("t.f32"), 1.5);
    EXPECT_EQ(file->number("t.f64"), 2.25);
    EXPECT_EQ(file->number("t.i8"), -7.0);
    EXPECT_EQ(file->boolean("t.yes"), true);
    EXPECT_EQ(file->boolean("t.no"), false);
    EXPECT_EQ(std::get<std::uint64_t>(file->find("t.huge")->value), ~0ull);
    EXPECT_EQ(file->find("t.f32")->type, GgufType::F32);
  }
}

TEST_F(GgufTest, AbsentKeysAreEmptyAndWrongTypesAreErrors) {
  const auto file = open(full_file().bytes());
  EXPECT_EQ(file->find("t.absent"), nullptr);
  EXPECT_EQ(file->integer("t.absent"), std::nullopt);
  EXPECT_EQ(file->number("t.absent"), std::nullopt);
  EXPECT_EQ(file->boolean("t.absent"), std::nullopt);
  EXPECT_EQ(file->string("t.absent"), std::nullopt);
  EXPECT_EQ(file->integer_for_layer("t.absent", 0), std::nullopt);
  EXPECT_EQ(file->number_for_layer("t.absent", 0), std::nullopt);
  EXPECT_THROW(file->integer("t.f32"), FormatError);
  EXPECT_THROW(file->integer("t.yes"), FormatError);
  EXPECT_THROW(file->integer("t.huge"), FormatError);
  EXPECT_THROW(file->integer("t.top_k"), FormatError);
  EXPECT_THROW(file->number("general.architecture"), FormatError);
  EXPECT_THROW(file->boolean("t.u8"), FormatError);
  EXPECT_THROW(file->string("t.u8"), FormatError);
}

TEST_F(GgufTest, ArraysDecodeAsTheirElementType) {
  for (const auto options : {kMapped, kRead}) {
    const auto file = open(full_file().bytes(), options);
    const auto array = [&](const char* key) { return std::get<GgufArray>(file->find(key)->value); };
    EXPECT_EQ(array("t.top_k").as_integers(), (std::vector<std::int64_t>{2, 0, 8}));
    EXPECT_EQ(array("t.top_k").as_numbers(), (std::vector<double>{2, 0, 8}));
    EXPECT_EQ(array("t.bytes").as_integers(), (std::vector<std::int64_t>{-1, 1}));
    EXPECT_EQ(array("t.flags").as_integers(), (std::vector<std::int64_t>{1, 0, 1}));
    EXPECT_EQ(array("t.limits").as_numbers(), (std::vector<double>{0.5, 7.0}));
    EXPECT_EQ(array("t.none").as_numbers(), std::vector<double>{});
    EXPECT_EQ(array("t.tokens").as_strings(),
              (std::vector<std::string>{"a", "", std::string("nul\0in", 6), "\xff\xfe"}));
    EXPECT_EQ(array("t.tokens").count, 4u);
    EXPECT_THROW(array("t.tokens").as_integers(), FormatError);
    EXPECT_THROW(array("t.tokens").as_numbers(), FormatError);
    EXPECT_THROW(array("t.limits").as_integers(), FormatError);
    EXPECT_THROW(array("t.none").as_integers(), FormatError);
    EXPECT_THROW(array("t.flags").as_numbers(), FormatError);
    EXPECT_THROW(array("t.top_k").as_strings(), FormatError);
    EXPECT_THROW(array("t.huges").as_integers(), FormatError);
  }
}

TEST_F(GgufTest, ArraysCheckTheirOwnBytes) {
  const std::byte two[2] = {};
  EXPECT_THROW((GgufArray{GgufType::U32, 1, two}.as_integers()), FormatError);
  EXPECT_THROW((GgufArray{GgufType::F64, ~0ull, two}.as_numbers()), FormatError);
  EXPECT_THROW((GgufArray{GgufType::String, ~0ull, two}.as_strings()), FormatError);
}

TEST_F(GgufTest, PerLayerValuesAreScalarsOrOneElementPerLayer) {
  const auto file = open(full_file().bytes());
  EXPECT_EQ(file->integer_for_layer("t.u8", 77), 200);
  EXPECT_EQ(file->integer_for_layer("t.top_k", 0), 2);
  EXPECT_EQ(file->integer_for_layer("t.top_k", 1), 0);
  EXPECT_EQ(file->integer_for_layer("t.top_k", 2), 8);
  EXPECT_THROW(file->integer_for_layer("t.top_k", 3), FormatError);
  EXPECT_THROW(file->integer_for_layer("t.top_k", -1), FormatError);
  EXPECT_THROW(file->integer_for_layer("t.limits", 0), FormatError);
  EXPECT_THROW(file->integer_for_layer("t.tokens", 0), FormatError);
  EXPECT_THROW(file->integer_for_layer("t.huges", 1), FormatError);
  EXPECT_EQ(file->number_for_layer("t.limits", 1), 7.0);
  EXPECT_EQ(file->number_for_layer("t.f32", 5), 1.5);
  EXPECT_EQ(file->number_for_layer("t.top_k", 2), 8.0);
  EXPECT_THROW(file->number_for_layer("t.limits", 2), FormatError);
}

TEST_F(GgufTest, TensorsHaveTheirShapeAndTheBytesOfTheFile) {
  const std::string bytes = full_file().bytes();
  for (const auto options : {kMapped, kRead}) {
    const auto file = open(bytes, options);
    EXPECT_EQ(file->tensors().size(), 7u);
    const GgufTensor* up = file->tensor("blk.0.ffn_up_exps.weight");
    ASSERT_NE(up, nullptr);
    EXPECT_EQ(up->quant, QuantType::Q4_0);
    EXPECT_EQ(up->rank, 3);
    EXPECT_EQ(up->shape[0], 4);
    EXPECT_EQ(up->shape[1], 3);
    EXPECT_EQ(up->shape[2], 32);
    EXPECT_EQ(up->shape[3], 1);
    EXPECT_EQ(up->nbytes, 4u * 3 * 18);
    EXPECT_EQ(up->offset % 32, 0u);
    for (const GgufTensor& tensor : file->tensors()) {
      const GgufBytes data = file->bytes(tensor);
      EXPECT_EQ(text_of(data), bytes.substr(tensor.offset, tensor.nbytes)) << tensor.name;
    }
    EXPECT_EQ(text_of(file->bytes(*file->tensor("no dims"))), "abcd");
    EXPECT_EQ(file->tensor("empty")->nbytes, 0u);
    EXPECT_EQ(file->tensor("empty")->shape[1], 0);
    EXPECT_EQ(file->tensor("absent"), nullptr);
    exercise(*file);
  }
}

TEST_F(GgufTest, AlignmentIsHonoured) {
  GgufWriter writer;
  writer.alignment = 256;
  writer.u32("general.alignment", 256);
  writer.filled("a", QuantType::F32, {3}).filled("b", QuantType::F32, {3});
  const auto file = open(writer.bytes());
  EXPECT_EQ(file->tensor("a")->offset % 256, 0u);
  EXPECT_EQ(file->tensor("b")->offset, file->tensor("a")->offset + 256);
  exercise(*file);
}

TEST_F(GgufTest, FileWithoutTensorsHasNoMoeLayers) {
  const auto file = open(GgufWriter().string("general.architecture", "clip").bytes());
  EXPECT_TRUE(file->tensors().empty());
  EXPECT_TRUE(file->moe_layers().empty());
  EXPECT_FALSE(find_moe_tensors(*file, 0).has_experts());
}

TEST_F(GgufTest, IoErrorsHaveTheirCode) {
  try {
    GgufFile::open(dir_.path() / "absent.gguf");
    ADD_FAILURE();
  } catch (const IoError& error) {
    EXPECT_EQ(error.code(), ENOENT);
    EXPECT_NE(error.path().find("absent.gguf"), std::string::npos);
  }
  EXPECT_THROW(GgufFile::open(dir_.path()), IoError);
  const auto pipe = dir_.path() / "pipe";
  ASSERT_EQ(::mkfifo(pipe.c_str(), 0600), 0);
  EXPECT_THROW(GgufFile::open(pipe), IoError);  // and does not wait for a writer
}

TEST_F(GgufTest, TensorsWithoutElementsHaveNoBytes) {
  for (const auto options : {kMapped, kRead}) {
    GgufWriter writer;
    writer.tensor("a", {0}, kF32, "")
        .tensor("b", {0, 5, 5}, kF32, "")
        .tensor("c", {1}, kF32, "cccc");
    writer.tensor("d", {32, 0}, 2, "");
    const auto file = open(writer.bytes(), options);
    for (const char* name : {"a", "b", "d"}) {
      EXPECT_EQ(file->tensor(name)->nbytes, 0u);
      EXPECT_TRUE(file->bytes(*file->tensor(name)).bytes.empty());
    }
    EXPECT_EQ(text_of(file->bytes(*file->tensor("c"))), "cccc");
    exercise(*file);
    // Only empty tensors: the padding before the data need not be there.
    exercise(*open(GgufWriter().tensor("a", {0}, kF32, "").bytes(), options));
  }
}

}  // namespace
}  // namespace moesaic::test
