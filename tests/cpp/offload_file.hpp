#pragma once

/// A GGUF file with a few MoE layers, for tests of stores.

#include <string>
#include <vector>

#include "gguf_writer.hpp"
#include "layers.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::testing {

enum class Storage : std::uint8_t { Split, Fused, PerExpert };

struct OffloadSpec {
  const char* name;
  QuantType gate_up, down;
  Storage storage = Storage::Split;
  std::int32_t experts = 8, top_k = 3, layers = 2;
  std::int64_t hidden = 256, intermediate = 256;
};

class OffloadFile {
 public:
  explicit OffloadFile(const OffloadSpec& spec) : spec_(spec) {
    const std::string arch = "qwen3moe";
    writer_.string("general.architecture", arch)
        .u32(arch + ".block_count", static_cast<std::uint32_t>(spec.layers))
        .u32(arch + ".embedding_length", static_cast<std::uint32_t>(spec.hidden))
        .u32(arch + ".expert_count", static_cast<std::uint32_t>(spec.experts))
        .u32(arch + ".expert_used_count", static_cast<std::uint32_t>(spec.top_k))
        .u32(arch + ".expert_feed_forward_length", static_cast<std::uint32_t>(spec.intermediate));
    for (std::int32_t layer = 0; layer < spec.layers; ++layer) add_layer(layer);
    path_ = folder_.write("model.gguf", writer_.bytes());
  }

  const std::filesystem::path& path() const { return path_; }
  std::shared_ptr<GgufFile> open(bool mmap = true) const { return GgufFile::open(path_, {mmap}); }

 private:
  void add(const std::string& name, const std::vector<std::int64_t>& shape, QuantType type,
           std::string_view bytes) {
    writer_.tensor(name, {shape.rbegin(), shape.rend()}, static_cast<std::uint32_t>(type), bytes);
  }
  static std::string text(const TestRole& role, std::int32_t expert) {
    const WeightRef& ref = role.weights.ref;
    return {reinterpret_cast<const char*>(ref.expert(expert)),
            static_cast<std::size_t>(ref.expert_stride)};
  }
  void add_layer(std::int32_t layer) {
    const auto seed = static_cast<std::uint32_t>(100 * layer);
    const std::string prefix = "blk." + std::to_string(layer) + ".ffn_";
    const TestRole router =
        make_role(1, spec_.experts, spec_.hidden, QuantType::F32, seed + 9, false);
    add(prefix + "gate_inp.weight", {spec_.experts, spec_.hidden}, QuantType::F32, text(router, 0));
    const auto role = [&](std::int64_t rows, std::int64_t cols, QuantType type, std::uint32_t s) {
      return make_role(spec_.experts, rows, cols, type, seed + s, false);
    };
    const TestRole gate = role(spec_.intermediate, spec_.hidden, spec_.gate_up, 1);
    const TestRole up = role(spec_.intermediate, spec_.hidden, spec_.gate_up, 2);
    const TestRole down = role(spec_.hidden, spec_.intermediate, spec_.down, 3);
    if (spec_.storage == Storage::Fused) {
      std::string both;
      for (std::int32_t e = 0; e < spec_.experts; ++e) both += text(gate, e) + text(up, e);
      add(prefix + "gate_up_exps.weight", {spec_.experts, 2 * spec_.intermediate, spec_.hidden},
          spec_.gate_up, both);
    } else {
      add_role(prefix + "gate", gate);
      add_role(prefix + "up", up);
    }
    add_role(prefix + "down", down);
  }
  void add_role(const std::string& name, const TestRole& role) {
    const WeightRef& ref = role.weights.ref;
    std::string all;
    for (std::int32_t e = 0; e < spec_.experts; ++e) {
      if (spec_.storage == Storage::PerExpert) {
        add(name + "." + std::to_string(e) + ".weight", {ref.rows, ref.cols}, ref.type,
            text(role, e));
      }
      all += text(role, e);
    }
    if (spec_.storage == Storage::PerExpert) return;
    add(name + "_exps.weight", {spec_.experts, ref.rows, ref.cols}, ref.type, all);
  }

  OffloadSpec spec_;
  test::GgufWriter writer_;
  test::TempDir folder_;
  std::filesystem::path path_;
};

}  // namespace moesaic::testing
