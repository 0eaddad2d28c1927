#include "moesaic/gguf.hpp"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <limits>
#include <random>
#include <thread>

#include "gguf_exercise.hpp"
#include "gguf_writer.hpp"
#include "moesaic/error.hpp"

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define MOESAIC_SANITIZED 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer)
#define MOESAIC_SANITIZED 1
#endif
#endif

namespace moesaic {
namespace {

using test::ByteWriter;
using test::exercise;
using test::GgufWriter;
using test::TempDir;

constexpr GgufFile::Options kMapped{true};
constexpr GgufFile::Options kRead{false};
constexpr std::uint32_t kF32 = 0;

std::string text_of(const GgufBytes& bytes) {
  return {reinterpret_cast<const char*>(bytes.bytes.data()), bytes.bytes.size()};
}

/// One entry of every value type and tensors of several kinds.
GgufWriter full_file() {
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

// ---- well-formed files

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

TEST_F(GgufTest, Arrays) {
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

TEST_F(GgufTest, PerLayerValues) {
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

TEST_F(GgufTest, Tensors) {
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

// ---- closing and sharing

TEST_F(GgufTest, CloseRefusesWhileBytesAreHeld) {
  const auto file = open(full_file().bytes());
  const GgufTensor& tensor = file->tensors()[0];
  GgufBytes held = file->bytes(tensor);
  GgufBytes copy = held;
  EXPECT_THROW(file->close(), DeviceError);
  held = {};
  EXPECT_THROW(file->close(), DeviceError);
  EXPECT_FALSE(file->closed());
  EXPECT_EQ(text_of(copy).size(), tensor.nbytes);
  copy = {};
  file->close();
  EXPECT_TRUE(file->closed());
  EXPECT_NO_THROW(file->close());
  EXPECT_THROW(file->bytes(tensor), DeviceError);
  // What was read at opening stays.
  EXPECT_EQ(file->tensors().size(), 7u);
  EXPECT_EQ(std::get<GgufArray>(file->find("t.tokens")->value).as_strings().size(), 4u);
}

TEST_F(GgufTest, BytesOutliveTheFile) {
  for (const auto options : {kMapped, kRead}) {
    const std::string bytes = full_file().bytes();
    auto file = open(bytes, options);
    const GgufTensor tensor = file->tensors()[1];
    const GgufBytes held = file->bytes(tensor);
    file.reset();
    EXPECT_EQ(text_of(held), bytes.substr(tensor.offset, tensor.nbytes));
  }
}

TEST_F(GgufTest, ReadModeBuffersAreTheirOwnAndDoNotHinderClosing) {
  const auto file = open(full_file().bytes(), kRead);
  const GgufBytes first = file->bytes(file->tensors()[0]);
  const GgufBytes second = file->bytes(file->tensors()[0]);
  EXPECT_NE(first.bytes.data(), second.bytes.data());
  EXPECT_EQ(reinterpret_cast<std::uintptr_t>(first.bytes.data()) % 64, 0u);
  EXPECT_NO_THROW(file->close());
  EXPECT_THROW(file->bytes(file->tensors()[0]), DeviceError);
  EXPECT_EQ(text_of(first), text_of(second));
}

TEST_F(GgufTest, ReadModeSurvivesATruncatedFile) {
  const auto file = open(full_file().bytes(), kRead);
  std::filesystem::resize_file(file->path(), 40);
  EXPECT_EQ(std::get<GgufArray>(file->find("t.tokens")->value).as_strings().size(), 4u);
  EXPECT_THROW(file->bytes(file->tensors()[0]), FormatError);
}

TEST_F(GgufTest, TensorsOfAnotherFileAreRefused) {
  const auto file = open(full_file().bytes());
  GgufTensor foreign = file->tensors()[0];
  foreign.shard = 1;
  EXPECT_THROW(file->bytes(foreign), FormatError);
  foreign.shard = 0;
  foreign.offset = file->file_bytes() - 1;
  EXPECT_THROW(file->bytes(foreign), FormatError);
  foreign.offset = ~0ull;
  EXPECT_THROW(file->bytes(foreign), FormatError);
  foreign.offset = 0;
  foreign.nbytes = file->file_bytes() + 1;
  EXPECT_THROW(file->bytes(foreign), FormatError);
}

TEST_F(GgufTest, ConcurrentReaders) {
  for (const auto options : {kMapped, kRead}) {
    const auto file = open(full_file().bytes(), options);
    const std::uint64_t expected = exercise(*file);
    std::atomic<int> wrong = 0;
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 50; ++i) wrong += exercise(*file) != expected;
      });
    }
    for (std::thread& thread : threads) thread.join();
    EXPECT_EQ(wrong, 0);
    EXPECT_NO_THROW(file->close());
  }
}

TEST_F(GgufTest, ClosingRacesWithReadersSafely) {
  for (int round = 0; round < 20; ++round) {
    const auto file = open(full_file().bytes());
    std::thread reader([&] {
      try {
        for (int i = 0; i < 1000; ++i) exercise(*file);
      } catch (const DeviceError&) {
      }
    });
    while (!file->closed()) {
      try {
        file->close();
      } catch (const DeviceError&) {
        std::this_thread::yield();
      }
    }
    reader.join();
  }
}

// ---- experts

TEST_F(GgufTest, MoeTensorsOfEveryName) {
  GgufWriter writer;
  const auto add = [&](const char* name) { writer.filled(name, QuantType::F32, {2}); };
  for (const char* name : {"blk.3.ffn_gate_inp.weight",
                           "blk.3.ffn_gate_inp.bias",
                           "blk.3.exp_probs_b.bias",
                           "blk.3.ffn_gate_exps.weight",
                           "blk.3.ffn_up_exps.weight",
                           "blk.3.ffn_down_exps.weight",
                           "blk.3.ffn_gate_exps.bias",
                           "blk.3.ffn_up_exps.bias",
                           "blk.3.ffn_down_exps.bias",
                           "blk.3.ffn_gate_exps.scale",
                           "blk.3.ffn_up_exps.scale",
                           "blk.3.ffn_down_exps.scale",
                           "blk.3.ffn_gate_shexp.weight",
                           "blk.3.ffn_up_shexp.weight",
                           "blk.3.ffn_down_shexp.weight",
                           "blk.3.ffn_gate_inp_shexp.weight",
                           "blk.10.ffn_gate_up_exps.weight",
                           "blk.10.ffn_down_exps.weight",
                           "blk.10.exp_probs_b",
                           "blk.2.ffn_up.weight",
                           "blk.2.ffn_gate_inp.weight",
                           "blk.03.ffn_up_exps.weight",
                           "blk.-1.ffn_up_exps.weight",
                           "blk.-0.ffn_up_exps.weight",
                           "blk..ffn_up_exps.weight",
                           "blk.99999999999.ffn_up_exps.weight",
                           "blk.7",
                           "blk.8.ffn_up_exps.weight.x"}) {
    add(name);
  }
  const auto file = open(writer.bytes());
  EXPECT_EQ(file->moe_layers(), (std::vector<std::int32_t>{3, 10}));

  const MoeTensors all = find_moe_tensors(*file, 3);
  const auto is = [&](const GgufTensor* tensor, const std::string& rest) {
    ASSERT_NE(tensor, nullptr) << rest;
    EXPECT_EQ(tensor->name, "blk.3." + rest);
  };
  is(all.router, "ffn_gate_inp.weight");
  is(all.router_bias, "ffn_gate_inp.bias");
  is(all.selection_bias, "exp_probs_b.bias");
  is(all.gate, "ffn_gate_exps.weight");
  is(all.up, "ffn_up_exps.weight");
  is(all.down, "ffn_down_exps.weight");
  is(all.gate_bias, "ffn_gate_exps.bias");
  is(all.up_bias, "ffn_up_exps.bias");
  is(all.down_bias, "ffn_down_exps.bias");
  is(all.gate_scale, "ffn_gate_exps.scale");
  is(all.up_scale, "ffn_up_exps.scale");
  is(all.down_scale, "ffn_down_exps.scale");
  is(all.shared_gate, "ffn_gate_shexp.weight");
  is(all.shared_up, "ffn_up_shexp.weight");
  is(all.shared_down, "ffn_down_shexp.weight");
  is(all.shared_router, "ffn_gate_inp_shexp.weight");
  EXPECT_EQ(all.gate_up, nullptr);
  EXPECT_TRUE(all.has_experts());

  const MoeTensors fused = find_moe_tensors(*file, 10);
  ASSERT_NE(fused.gate_up, nullptr);
  EXPECT_EQ(fused.gate_up->name, "blk.10.ffn_gate_up_exps.weight");
  ASSERT_NE(fused.selection_bias, nullptr);
  EXPECT_EQ(fused.selection_bias->name, "blk.10.exp_probs_b");
  EXPECT_EQ(fused.router, nullptr);
  EXPECT_TRUE(fused.has_experts());
  EXPECT_FALSE(find_moe_tensors(*file, 2).has_experts());
  EXPECT_FALSE(find_moe_tensors(*file, -1).has_experts());
}

TEST_F(GgufTest, OneTensorPerExpert) {
  GgufWriter writer;
  for (const int expert : {0, 2, 1, 10, 9, 8, 7, 6, 5, 4, 3}) {
    for (const char* role : {"gate", "up", "down"}) {
      writer.filled("blk.1.ffn_" + std::string(role) + "." + std::to_string(expert) + ".weight",
                    QuantType::F32, {2, 2});
    }
  }
  const auto file = open(writer.bytes());
  EXPECT_EQ(file->moe_layers(), std::vector<std::int32_t>{1});
  const MoeTensors tensors = find_moe_tensors(*file, 1);
  EXPECT_TRUE(tensors.has_experts());
  EXPECT_EQ(tensors.expert_gate.size(), 11u);
  EXPECT_EQ(tensors.expert_up.size(), 11u);
  ASSERT_EQ(tensors.expert_down.size(), 11u);
  EXPECT_EQ(tensors.expert_down[10]->name, "blk.1.ffn_down.10.weight");
  EXPECT_EQ(tensors.expert_gate[2]->name, "blk.1.ffn_gate.2.weight");

  writer.filled("blk.1.ffn_up.12.weight", QuantType::F32, {2, 2});
  EXPECT_THROW(find_moe_tensors(*open(writer.bytes()), 1), FormatError);
}

// ---- shards

class GgufShardTest : public GgufTest {
 protected:
  static GgufWriter shard(int index, int count, int total) {
    GgufWriter writer;
    if (index == 0) writer.string("general.architecture", "testmoe");
    writer.scalar<std::uint16_t>("split.no", GgufType::U16, static_cast<std::uint16_t>(index))
        .scalar<std::uint16_t>("split.count", GgufType::U16, static_cast<std::uint16_t>(count))
        .scalar<std::int32_t>("split.tensors.count", GgufType::I32, total);
    return writer;
  }
  static std::string name(int number, int count, const std::string& prefix = "model") {
    char text[64];
    std::snprintf(text, sizeof(text), "-%05d-of-%05d.gguf", number, count);
    return prefix + text;
  }
  /// Three shards with one, zero and two tensors.
  void write_all() {
    dir_.write(name(1, 3), shard(0, 3, 3).filled("a", QuantType::F32, {3}).bytes());
    dir_.write(name(2, 3), shard(1, 3, 3).bytes());
    dir_.write(name(3, 3), shard(2, 3, 3)
                               .filled("blk.4.ffn_up_exps.weight", QuantType::F32, {5})
                               .filled("c", QuantType::F32, {7})
                               .bytes());
  }
  void expect_shard_error(const std::string& file, const std::vector<std::string>& parts) {
    try {
      GgufFile::open(dir_.path() / file);
      ADD_FAILURE() << "accepted; wanted " << parts.front();
    } catch (const FormatError& error) {
      const std::string message = error.what();
      for (const std::string& part : parts) {
        EXPECT_NE(message.find(part), std::string::npos) << message << "\nlacks: " << part;
      }
    }
  }
};

TEST_F(GgufShardTest, AnyShardOpensAll) {
  write_all();
  for (const auto options : {kMapped, kRead}) {
    for (int given = 1; given <= 3; ++given) {
      const auto file = GgufFile::open(dir_.path() / name(given, 3), options);
      EXPECT_EQ(file->path(), dir_.path() / name(given, 3));
      ASSERT_EQ(file->shard_paths().size(), 3u);
      EXPECT_EQ(file->shard_paths()[1], dir_.path() / name(2, 3));
      ASSERT_EQ(file->tensors().size(), 3u);
      EXPECT_EQ(file->tensors()[0].name, "a");
      EXPECT_EQ(file->tensor("c")->shard, 2u);
      EXPECT_EQ(file->string("general.architecture"), "testmoe");
      EXPECT_EQ(file->integer("split.no"), 0);
      EXPECT_EQ(file->moe_layers(), std::vector<std::int32_t>{4});
      std::uint64_t total = 0;
      for (const auto& path : file->shard_paths()) total += std::filesystem::file_size(path);
      EXPECT_EQ(file->file_bytes(), total);
      for (const GgufTensor& tensor : file->tensors()) {
        std::ifstream in(file->shard_paths()[tensor.shard], std::ios::binary);
        std::string expected(tensor.nbytes, '\0');
        in.seekg(static_cast<std::streamoff>(tensor.offset));
        in.read(expected.data(), static_cast<std::streamsize>(expected.size()));
        EXPECT_EQ(text_of(file->bytes(tensor)), expected);
      }
      exercise(*file);
    }
  }
}

TEST_F(GgufShardTest, HoldingBytesOfAnyShardRefusesClosing) {
  write_all();
  const auto file = GgufFile::open(dir_.path() / name(1, 3));
  GgufBytes held = file->bytes(*file->tensor("c"));
  EXPECT_THROW(file->close(), DeviceError);
  EXPECT_NO_THROW(file->bytes(*file->tensor("a")));  // nothing was closed half way
  held = {};
  EXPECT_NO_THROW(file->close());
}

TEST_F(GgufShardTest, MissingShard) {
  write_all();
  std::filesystem::remove(dir_.path() / name(2, 3));
  try {
    GgufFile::open(dir_.path() / name(1, 3));
    ADD_FAILURE();
  } catch (const IoError& error) {
    EXPECT_EQ(error.code(), ENOENT);
    EXPECT_NE(error.path().find(name(2, 3)), std::string::npos);
  }
}

TEST_F(GgufShardTest, WrongShardsAreRefused) {
  write_all();
  dir_.write(name(2, 3), shard(2, 3, 3).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.no", "expected 1", "got 2"});
  dir_.write(name(2, 3), shard(1, 4, 3).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.count", "expected 3", "got 4"});
  dir_.write(name(2, 3), shard(1, 3, 9).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.tensors.count", "expected 3", "got 9"});
  dir_.write(name(2, 3), GgufWriter().bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "split.count"});
  dir_.write(name(2, 3), shard(1, 3, 3).filled("a", QuantType::F32, {3}).bytes());
  expect_shard_error(name(1, 3), {"split.tensors.count", "expected 3", "got 4"});
  dir_.write(name(3, 3), shard(2, 3, 3).filled("c", QuantType::F32, {3}).bytes());
  expect_shard_error(name(1, 3), {name(2, 3), "'a'", "unique tensor names", name(1, 3)});
}

TEST_F(GgufShardTest, NamesMustAgreeWithTheKeys) {
  dir_.write("renamed.gguf", shard(0, 3, 3).bytes());
  expect_shard_error("renamed.gguf", {"-00001-of-00003.gguf"});
  dir_.write(name(2, 3), shard(0, 3, 3).bytes());
  expect_shard_error(name(2, 3), {"-00001-of-00003.gguf"});
  dir_.write(name(1, 4), shard(0, 3, 3).bytes());
  expect_shard_error(name(1, 4), {"-00001-of-00003.gguf"});
}

TEST_F(GgufShardTest, KeysMustBeInRange) {
  dir_.write(name(1, 3), shard(3, 3, 3).bytes());
  expect_shard_error(name(1, 3), {"split.no", "0 to 2", "got 3"});
  dir_.write(name(1, 3),
             GgufWriter().scalar<std::int64_t>("split.count", GgufType::I64, 1 << 20).bytes());
  expect_shard_error(name(1, 3), {"split.count", "1048576"});
  dir_.write(name(1, 3),
             GgufWriter().scalar<std::int32_t>("split.count", GgufType::I32, -2).bytes());
  expect_shard_error(name(1, 3), {"split.count", "-2"});
  dir_.write(name(1, 3), GgufWriter().u32("split.count", 3).bytes());
  expect_shard_error(name(1, 3), {"split.no", "no such key"});
  dir_.write(name(1, 3), GgufWriter().string("split.count", "3").bytes());
  expect_shard_error(name(1, 3), {"split.count", "an integer", "string"});
}

TEST_F(GgufShardTest, OneShardOrNoneIsOneFile) {
  dir_.write(name(1, 1), shard(0, 1, 1).filled("a", QuantType::F32, {3}).bytes());
  EXPECT_EQ(GgufFile::open(dir_.path() / name(1, 1))->tensors().size(), 1u);
  // A name alone does not make a split file.
  dir_.write(name(1, 9), GgufWriter().filled("a", QuantType::F32, {3}).bytes());
  EXPECT_EQ(GgufFile::open(dir_.path() / name(1, 9))->shard_paths().size(), 1u);
}

TEST_F(GgufShardTest, RelativePathsWork) {
  write_all();
  const auto before = std::filesystem::current_path();
  std::filesystem::current_path(dir_.path());
  std::shared_ptr<GgufFile> file;
  EXPECT_NO_THROW(file = GgufFile::open(name(2, 3)));
  std::filesystem::current_path(before);
  ASSERT_NE(file, nullptr);
  EXPECT_EQ(file->tensors().size(), 3u);
}

// ---- hazards: each names its field and its place

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

TEST_F(GgufTest, ZeroDims) {
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

TEST_F(GgufTest, UnknownTensorTypesAreRefusedByName) {
  for (const std::uint32_t id :
       {4u, 5u, 31u, 33u, 36u, 37u, 38u, 43u, 97u, 138u, 255u, 256u, ~0u}) {
    std::string remark(quant_id_remark(id));
    EXPECT_FALSE(remark.empty());
    expect_refused(GgufWriter().tensor("t", {32}, id, "").bytes(),
                   {"byte 45", "'t': type", std::to_string(id), remark});
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

// ---- damage of every kind

TEST_F(GgufTest, TruncatedAtEveryByte) {
  const std::string bytes = full_file().bytes();
  ASSERT_LE(bytes.size(), 65536u);
  const auto path = dir_.write("test.gguf", bytes);
  exercise(*GgufFile::open(path));
  for (std::size_t size = bytes.size(); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    ASSERT_THROW(GgufFile::open(path, size % 2 ? kRead : kMapped), FormatError) << size;
  }
}

TEST_F(GgufTest, TruncatedMetadataAtEveryByte) {
  const std::string bytes =
      GgufWriter().strings("a", {"x", "yy"}).array<float>("b", GgufType::F32, {1, 2}).bytes();
  const auto path = dir_.write("test.gguf", bytes);
  for (std::size_t size = bytes.size(); size-- > 0;) {
    std::filesystem::resize_file(path, size);
    ASSERT_THROW(GgufFile::open(path), FormatError) << size;
  }
}

TEST_F(GgufTest, SeededCorruptions) {
  const std::string intact = full_file().bytes();
  const std::size_t head = intact.find("no dims") + 32;  // where a changed byte can matter most
  const std::uint64_t odd_values[] = {
      0,          1,          0x7f,       0xff,  0xffff,    ~0u,        1u << 31, 1ull << 32,
      1ull << 61, 1ull << 62, 1ull << 63, ~0ull, ~0ull - 7, ~0ull >> 1, 9,        8};
  std::mt19937_64 random(20240229);
  int refused = 0;
  int accepted = 0;
  const auto path = dir_.path() / "test.gguf";
  for (int round = 0; round < 10000; ++round) {
    std::string bytes = intact;
    const auto changes = 1 + random() % 4;
    for (std::uint64_t change = 0; change < changes; ++change) {
      const std::size_t at = random() % head;
      switch (random() % 4) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes[at] = static_cast<char>(bytes[at] ^ (1 << random() % 8));
          break;
        case 2: {
          const std::uint64_t value = odd_values[random() % std::size(odd_values)];
          std::memcpy(bytes.data() + at, &value, random() % 2 ? 8 : 4);
          break;
        }
        case 3: {  // move a run of bytes
          const std::size_t size = 1 + random() % 24;
          bytes.erase(at, size);
          if (random() % 2) bytes.insert(at, size, static_cast<char>(random()));
          break;
        }
      }
    }
    dir_.write("test.gguf", bytes);
    try {
      exercise(*GgufFile::open(path, round % 2 ? kRead : kMapped));
      ++accepted;
    } catch (const FormatError&) {
      ++refused;
    } catch (const IoError& error) {
      ADD_FAILURE() << "round " << round << ": " << error.what();
    }
  }
  // Both ends of the test are reached.
  EXPECT_GT(accepted, 500);
  EXPECT_GT(refused, 500);
}

// ---- size and speed

std::size_t resident_bytes() {
  std::ifstream statm("/proc/self/statm");
  std::size_t pages = 0;
  std::size_t resident = 0;
  statm >> pages >> resident;
  return resident * static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
}

TEST_F(GgufTest, LargeVocabularyOpensFastAndSmall) {
#ifdef MOESAIC_SANITIZED
  GTEST_SKIP() << "sanitizers change time and memory";
#endif
  std::vector<std::string> tokens;
  std::vector<std::string> merges;
  for (int i = 0; i < 150000; ++i) {
    tokens.push_back("token" + std::to_string(i));
    merges.push_back("tok en" + std::to_string(i));
  }
  GgufWriter writer;
  writer.strings("tokenizer.ggml.tokens", tokens)
      .strings("tokenizer.ggml.merges", merges)
      .array("tokenizer.ggml.scores", GgufType::F32, std::vector<float>(150000, 0.5f))
      .array("tokenizer.ggml.token_type", GgufType::I32, std::vector<std::int32_t>(150000, 1));
  for (int i = 0; i < 600; ++i) {
    writer.filled("blk." + std::to_string(i) + ".ffn_up_exps.weight", QuantType::Q4_0, {2, 2, 32});
  }
  const auto path = dir_.write("large.gguf", writer.bytes());
  writer = {};

  double best = 1e9;
  for (int attempt = 0; attempt < 5; ++attempt) {
    const std::size_t before = resident_bytes();
    const auto start = std::chrono::steady_clock::now();
    const auto file = GgufFile::open(path, attempt % 2 ? kRead : kMapped);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    best = std::min(best, took.count());
    const std::size_t after = resident_bytes();
    EXPECT_LT(after - std::min(before, after), 20u << 20);
    EXPECT_EQ(file->moe_layers().size(), 600u);
    if (attempt == 0) {
      EXPECT_EQ(std::get<GgufArray>(file->find("tokenizer.ggml.tokens")->value).as_strings(),
                tokens);
    }
  }
  RecordProperty("open_seconds", std::to_string(best));
  EXPECT_LT(best, 0.1);
}

}  // namespace
}  // namespace moesaic
