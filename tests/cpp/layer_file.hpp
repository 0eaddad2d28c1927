#pragma once

/// GGUF files of one MoE layer, for tests of what their metadata means.

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gguf_writer.hpp"
#include "gtest/gtest.h"
#include "model/presets.hpp"
#include "moesaic/config.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"
#include "random.hpp"

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
  /// Small values that differ from tensor to tensor, so that a layer of them can run.
  FileBuilder& tensor(const std::string& name, const std::vector<std::int64_t>& shape,
                      QuantType type = QuantType::F32) {
    std::int64_t rows = 1;
    for (std::size_t i = 0; i + 1 < shape.size(); ++i) rows *= shape[i];
    const std::int64_t cols = shape.back(), stride = row_bytes(type, cols);
    std::string data(static_cast<std::size_t>(rows * stride), '\0');
    testing::Random random(static_cast<std::uint32_t>(std::hash<std::string>{}(name)));
    std::vector<float> row(static_cast<std::size_t>(cols));
    for (std::int64_t r = 0; r < rows; ++r) {
      for (float& v : row) v = random.normal(0.2F);
      quantize_row(type, row.data(), reinterpret_cast<std::byte*>(data.data() + r * stride), cols);
    }
    writer.tensor("blk.1." + name, {shape.rbegin(), shape.rend()}, static_cast<std::uint32_t>(type),
                  data);
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

/// A file with everything that a row asks for, and no more.
inline FileBuilder file_of(const Preset& p) {
  constexpr std::int64_t kLatent = 32;
  const Model& m = *p.model;
  FileBuilder b{std::string(p.architecture)};
  b.sizes().u32("expert_feed_forward_length", kWidth);
  if (p.score_key == Use::Required) b.u32("expert_gating_func", 2);
  if (p.renormalize_key == Use::Required) b.boolean("expert_weights_norm", true);
  if (p.scale_key == Use::Required) b.f32("expert_weights_scale", 1.5F);
  if (p.limit_key == Use::Required) b.f32("swiglu_clamp_exp", 5.0F);
  if (m.activation == ActivationKind::SiTu) {
    b.f32("activation.situ_beta", 4.0F).f32("activation.situ_linear_beta", 25.0F);
  }
  if (m.input_norm || m.router_input == RouterInput::Norm || !p.latent_key.empty()) {
    b.f32("attention.layer_norm_rms_epsilon", 1e-5F);
  }
  if (m.router_bias == Use::Required) b.values("ffn_gate_inp.bias", {1, 2, 3, 4});
  if (p.bias_use(m) == Use::Required) b.values("exp_probs_b.bias", {1, 2, 3, 4});
  if (m.input_norm) b.tensor("pre_ffw_norm_2.weight", {kHidden});
  if (m.router_input == RouterInput::Norm) b.tensor("ffn_gate_inp.scale", {kHidden});
  const bool gated = Activation{m.activation}.gated();
  const std::int64_t hidden = p.latent_key.empty() ? kHidden : kLatent;
  if (!p.latent_key.empty()) {
    b.u32(std::string(p.latent_key), kLatent)
        .tensor("ffn_latent_down.weight", {kLatent, kHidden})
        .tensor("ffn_latent_up.weight", {kHidden, kLatent});
  }
  b.tensor("ffn_gate_inp.weight", {kExperts, kHidden});
  if (gated) b.tensor("ffn_gate_exps.weight", {kExperts, kWidth, hidden}, QuantType::Q8_0);
  b.tensor("ffn_up_exps.weight", {kExperts, kWidth, hidden}, QuantType::Q4_0)
      .tensor("ffn_down_exps.weight", {kExperts, hidden, kWidth}, QuantType::Q8_0);
  if (p.shared_tensors == Use::Ignored) return b;
  if (p.shared_width == SharedWidth::Key) b.u32("expert_shared_feed_forward_length", 2 * kWidth);
  if (p.shared_width == SharedWidth::Count) b.u32("expert_shared_count", 2);
  if (p.shared_width == SharedWidth::KeyTimesCount) {
    b.u32("expert_shared_feed_forward_length", kWidth).u32("expert_shared_count", 2);
  }
  if (gated) b.tensor("ffn_gate_shexp.weight", {2 * kWidth, kHidden});
  b.tensor("ffn_up_shexp.weight", {2 * kWidth, kHidden})
      .tensor("ffn_down_shexp.weight", {kHidden, 2 * kWidth});
  if (m.shared == SharedKind::SigmoidGated) b.tensor("ffn_gate_inp_shexp.weight", {kHidden});
  return b;
}

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
