#pragma once

/// GGUF files of one MoE layer, for tests of what their metadata means.

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gguf_writer.hpp"
#include "gtest/gtest.h"
#include "moesaic/config.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "route/presets.hpp"

namespace moesaic::test {

inline constexpr std::uint32_t kHidden = 64, kExperts = 4, kWidth = 32;

/// Writes a file of one MoE block (block 1; block 0 is dense), whose parts a test may change.
struct FileBuilder {
  std::string architecture = "qwen3moe";

  GgufWriter writer;

  explicit FileBuilder(std::string arch = "qwen3moe") : architecture(std::move(arch)) {
    writer.string("general.architecture", architecture);
  }
  std::string key(const std::string& name) const { return architecture + "." + name; }
  FileBuilder& u32(const std::string& name, std::uint32_t value) {
    writer.u32(key(name), value);
    return *this;
  }
  FileBuilder& f32(const std::string& name, float value) {
    writer.scalar(key(name), GgufType::F32, value);
    return *this;
  }
  FileBuilder& boolean(const std::string& name, bool value) {
    writer.scalar(key(name), GgufType::Bool, static_cast<std::uint8_t>(value));
    return *this;
  }
  FileBuilder& per_layer(const std::string& name, const std::vector<std::uint32_t>& values) {
    writer.array(key(name), GgufType::U32, values);
    return *this;
  }
  /// Keys that every file has.
  FileBuilder& sizes() {
    return u32("block_count", 2)
        .u32("embedding_length", kHidden)
        .u32("expert_count", kExperts)
        .u32("expert_used_count", 2);
  }
  FileBuilder& tensor(const std::string& name, const std::vector<std::int64_t>& shape,
                      QuantType type = QuantType::F32) {
    writer.filled("blk.1." + name, type, shape);
    return *this;
  }
  FileBuilder& values(const std::string& name, const std::vector<float>& data) {
    writer.tensor("blk.1." + name, {static_cast<std::int64_t>(data.size())}, 0,
                  {reinterpret_cast<const char*>(data.data()), data.size() * sizeof(float)});
    return *this;
  }
  FileBuilder& stacks(std::int64_t width = kWidth, std::int64_t count = kExperts) {
    return tensor("ffn_gate_inp.weight", {count, kHidden})
        .tensor("ffn_gate_exps.weight", {count, width, kHidden}, QuantType::Q4_0)
        .tensor("ffn_up_exps.weight", {count, width, kHidden}, QuantType::Q4_0)
        .tensor("ffn_down_exps.weight", {count, kHidden, width}, QuantType::Q8_0);
  }
  FileBuilder& shared(std::int64_t width) {
    return tensor("ffn_gate_shexp.weight", {width, kHidden})
        .tensor("ffn_up_shexp.weight", {width, kHidden})
        .tensor("ffn_down_shexp.weight", {kHidden, width});
  }
};

/// The file stays open for as long as the test's object lives.
struct OpenFile {
  TempDir dir;
  std::shared_ptr<GgufFile> file;
  explicit OpenFile(const FileBuilder& builder)
      : file(GgufFile::open(dir.write("model.gguf", builder.writer.bytes()))) {}
};

inline MoeConfig read(const FileBuilder& builder) {
  return MoeConfig::from_gguf(*OpenFile(builder).file, 1);
}
inline MoeConfig read(const FileBuilder& builder, const Preset& preset) {
  return config_from_preset(*OpenFile(builder).file, 1, preset);
}

template <class E>
std::string error_of(const FileBuilder& builder, const Preset* preset = nullptr) {
  try {
    preset != nullptr ? read(builder, *preset) : read(builder);
  } catch (const E& error) {
    return error.what();
  }
  return "(no error of this kind)";
}

inline void expect_contains(const std::string& text, const std::string& part) {
  EXPECT_NE(text.find(part), std::string::npos) << "\"" << part << "\" is not in: " << text;
}

}  // namespace moesaic::test
