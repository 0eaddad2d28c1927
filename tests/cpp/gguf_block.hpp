#pragma once

/// GGUF files of MoE blocks in every way in which files store experts, with the blocks' outputs in
/// f64.

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "gguf_writer.hpp"
#include "layers.hpp"

namespace moesaic::testing {

using test::GgufWriter;
using test::TempDir;

inline constexpr std::int64_t kTokens = 5, kHidden = 256, kWidth = 256, kSharedWidth = 64;
inline constexpr std::int32_t kExperts = 5, kTopK = 2;

enum class Storage : std::uint8_t { Split, Fused, PerExpert };

/// One block of a file.
struct BlockSpec {
  const char* name;
  const char* architecture;
  QuantType gate, up, down;
  Storage storage = Storage::Split;
  bool bias = false, scale = false;
  QuantType router = QuantType::F32;
  bool plain_shared = false;
};

inline constexpr BlockSpec kBlocks[] = {
    {"qwen3moe", "qwen3moe", QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K},
    {"qwen2moe", "qwen2moe", QuantType::Q5_K, QuantType::Q5_K, QuantType::Q8_0},
    {"olmoe", "olmoe", QuantType::Q4_0, QuantType::Q4_0, QuantType::Q5_1},
    {"llama", "llama", QuantType::Q3_K, QuantType::Q3_K, QuantType::Q5_K},
    {"llama_shared", "llama", QuantType::Q4_1, QuantType::Q4_1, QuantType::Q8_0, Storage::Split,
     false, false, QuantType::F32, true},
    {"type_per_role", "qwen3moe", QuantType::IQ4_XS, QuantType::Q8_0, QuantType::BF16,
     Storage::Split, false, false, QuantType::F16},
    {"biases", "qwen3moe", QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4, Storage::Split,
     true},
    {"scales", "qwen3moe", QuantType::NVFP4, QuantType::NVFP4, QuantType::NVFP4, Storage::Split,
     false, true},
    {"biases_and_scales", "qwen2moe", QuantType::Q8_0, QuantType::F16, QuantType::Q4_1,
     Storage::Split, true, true},
    {"fused", "qwen3moe", QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K, Storage::Fused},
    {"fused_bias", "qwen3moe", QuantType::Q5_0, QuantType::Q5_0, QuantType::Q8_0, Storage::Fused,
     true},
    {"fused_scale", "qwen3moe", QuantType::NVFP4, QuantType::NVFP4, QuantType::NVFP4,
     Storage::Fused, false, true},
    {"fused_bias_and_scale", "qwen3moe", QuantType::F32, QuantType::F32, QuantType::F16,
     Storage::Fused, true, true},
    {"per_expert", "llama", QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K, Storage::PerExpert},
    {"per_expert_types", "llama", QuantType::Q2_K, QuantType::F16, QuantType::IQ4_NL,
     Storage::PerExpert, true, true},
};

inline std::string_view chars(const void* data, std::size_t bytes) {
  return {static_cast<const char*>(data), bytes};
}
inline std::string_view chars(const Floats& values) {
  return chars(values.data(), values.size() * sizeof(float));
}

/// The weights of one block, from which a file and the expected values are made.
struct Block {
  BlockSpec spec;
  TestLayer experts;
  TestRole router;  ///< one "expert" of [E, H]
  TestLayer shared;
  Floats shared_gate;

  Block(const BlockSpec& s, std::uint32_t seed)
      : spec(s),
        experts(expert_case(s), seed),
        router(make_role(1, kExperts, kHidden, s.router, seed + 3, false)),
        shared(shared_case(), seed + 4),
        shared_gate(random_values(kHidden, seed + 7, 0.1F)) {
    for (TestRole* role : {&experts.gate, &experts.up, &experts.down}) {
      if (!s.bias) role->weights.bias = nullptr;
      if (!s.scale) role->weights.scale = nullptr;
    }
    // Both halves of a fused tensor have one scale.
    if (s.storage == Storage::Fused) experts.gate.weights.scale = experts.up.weights.scale;
  }
  bool gated_shared() const { return std::string(spec.architecture) == "qwen2moe"; }
  bool has_shared() const { return gated_shared() || spec.plain_shared; }
  bool renormalizes() const {
    return std::string(spec.architecture) == "qwen3moe" ||
           std::string(spec.architecture) == "llama";
  }

  static Case expert_case(const BlockSpec& s) {
    return {s.name,
            kTokens,
            kHidden,
            kWidth,
            kExperts,
            kTopK,
            s.gate,
            s.up,
            s.down,
            RoutingShape::Uniform,
            ActivationKind::SwiGlu,
            true};
  }
  static Case shared_case() {
    return {"shared", kTokens,         kHidden,         kSharedWidth,   1,
            1,        QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_0};
  }
};

/// Keys and tensors of a file. A test can leave one tensor out or give it another shape, if it says
/// so before it adds the block.
class BlockFile {
 public:
  explicit BlockFile(const std::string& architecture) {
    writer_.string("general.architecture", architecture);
    for (const auto& [key, value] : {std::pair{"block_count", std::int64_t{2}},
                                     {"embedding_length", kHidden},
                                     {"expert_count", kExperts},
                                     {"expert_used_count", kTopK},
                                     {"expert_feed_forward_length", kWidth}}) {
      writer_.u32(architecture + "." + key, static_cast<std::uint32_t>(value));
    }
  }
  std::string without;  ///< this tensor is not written
  struct Reshaped {
    std::string name;
    std::vector<std::int64_t> shape;  ///< of as many elements or fewer
    std::optional<QuantType> type;
  };
  std::optional<Reshaped> reshaped;

  BlockFile& tensor(const std::string& name, std::vector<std::int64_t> shape, QuantType type,
                    std::string_view data) {
    if (name == without) return *this;
    if (reshaped && name == reshaped->name) {
      shape = reshaped->shape;
      type = reshaped->type.value_or(type);
      std::int64_t bytes = row_bytes(type, shape.back());
      for (std::size_t i = 0; i + 1 < shape.size(); ++i) bytes *= shape[i];
      data = data.substr(0, static_cast<std::size_t>(bytes));
    }
    writer_.tensor(name, {shape.rbegin(), shape.rend()}, static_cast<std::uint32_t>(type), data);
    return *this;
  }
  BlockFile& block(std::int32_t layer, const Block& block) {
    const std::string prefix = "blk." + std::to_string(layer) + ".ffn_";
    role(prefix + "gate_inp.weight", block.router, {kExperts, kHidden});
    const TestLayer& experts = block.experts;
    switch (block.spec.storage) {
      case Storage::Split:
        stacked(prefix + "gate_exps", experts.gate);
        stacked(prefix + "up_exps", experts.up);
        break;
      case Storage::Fused:
        fused(prefix, experts.gate, experts.up);
        break;
      case Storage::PerExpert:
        per_expert(prefix + "gate", experts.gate);
        per_expert(prefix + "up", experts.up);
        per_expert(prefix + "down", experts.down);
        epilogue(prefix + "gate_exps", experts.gate);
        epilogue(prefix + "up_exps", experts.up);
        epilogue(prefix + "down_exps", experts.down);
        break;
    }
    if (block.spec.storage != Storage::PerExpert) stacked(prefix + "down_exps", experts.down);
    if (block.has_shared()) {
      role(prefix + "gate_shexp.weight", block.shared.gate, {kSharedWidth, kHidden});
      role(prefix + "up_shexp.weight", block.shared.up, {kSharedWidth, kHidden});
      role(prefix + "down_shexp.weight", block.shared.down, {kHidden, kSharedWidth});
      if (block.gated_shared()) {
        tensor(prefix + "gate_inp_shexp.weight", {kHidden}, QuantType::F32,
               chars(block.shared_gate));
      }
    }
    return *this;
  }
  std::string bytes() const { return writer_.bytes(); }

 private:
  BlockFile& role(const std::string& name, const TestRole& role, std::vector<std::int64_t> shape) {
    return tensor(name, std::move(shape), role.weights.ref.type,
                  chars(role.bytes->data(), role.bytes->size()));
  }
  void epilogue(const std::string& name, const TestRole& role) {
    if (role.weights.bias) {
      tensor(name + ".bias", {kExperts, role.weights.ref.rows}, QuantType::F32,
             chars(*role.weights.bias));
    }
    if (role.weights.scale) {
      tensor(name + ".scale", {kExperts}, QuantType::F32, chars(*role.weights.scale));
    }
  }
  void stacked(const std::string& name, const TestRole& weights) {
    role(name + ".weight", weights, {kExperts, weights.weights.ref.rows, weights.weights.ref.cols});
    epilogue(name, weights);
  }
  void per_expert(const std::string& name, const TestRole& role) {
    const WeightRef& ref = role.weights.ref;
    // Real files scatter the experts; here they stand in descending order.
    for (std::int32_t e = kExperts; e-- > 0;) {
      tensor(name + "." + std::to_string(e) + ".weight", {ref.rows, ref.cols}, ref.type,
             chars(ref.expert(e), static_cast<std::size_t>(ref.expert_stride)));
    }
  }
  void fused(const std::string& prefix, const TestRole& gate, const TestRole& up) {
    std::string weights;
    Floats bias;
    for (std::int32_t e = 0; e < kExperts; ++e) {
      for (const TestRole* role : {&gate, &up}) {
        const WeightRef& ref = role->weights.ref;
        weights += chars(ref.expert(e), static_cast<std::size_t>(ref.expert_stride));
        if (!role->weights.bias) continue;
        const auto first = role->weights.bias->begin() + e * ref.rows;
        bias.insert(bias.end(), first, first + ref.rows);
      }
    }
    tensor(prefix + "gate_up_exps.weight", {kExperts, 2 * kWidth, kHidden}, gate.weights.ref.type,
           weights);
    if (!bias.empty()) {
      tensor(prefix + "gate_up_exps.bias", {kExperts, 2 * kWidth}, QuantType::F32, chars(bias));
    }
    if (up.weights.scale) {
      tensor(prefix + "up_exps.scale", {kExperts}, QuantType::F32, chars(*up.weights.scale));
    }
  }

  GgufWriter writer_;
};

/// Softmax over all experts, the best kTopK, renormalised where the architecture does it.
inline Routing route_f64(const Block& block, const Floats& x) {
  Routing routing(kTokens, kTopK);
  for (std::int64_t t = 0; t < kTokens; ++t) {
    const Doubles row(x.begin() + t * kHidden, x.begin() + (t + 1) * kHidden);
    Doubles p = apply_f64(block.router, 0, row.data());
    double sum = 0.0;
    for (double& v : p) sum += v = std::exp(v);
    for (double& v : p) v /= sum;
    std::vector<std::int32_t> order(kExperts);
    std::iota(order.begin(), order.end(), 0);
    std::ranges::sort(order, [&](std::int32_t a, std::int32_t b) {
      return p[static_cast<std::size_t>(a)] > p[static_cast<std::size_t>(b)];
    });
    double chosen = 0.0;
    for (std::size_t s = 0; s < kTopK; ++s) chosen += p[static_cast<std::size_t>(order[s])];
    for (std::size_t s = 0; s < kTopK; ++s) {
      const std::size_t pair = static_cast<std::size_t>(t) * kTopK + s;
      routing.topk_ids()[pair] = order[s];
      const double weight = p[static_cast<std::size_t>(order[s])];
      routing.topk_weights()[pair] =
          static_cast<float>(block.renormalizes() ? weight / chosen : weight);
    }
  }
  return routing;
}

/// The block's output in f64.
inline Doubles layer_f64(const Block& block, const Floats& x) {
  Doubles y = forward_f64(block.experts, x, route_f64(block, x));
  if (block.has_shared()) {
    add_shared_f64(block.shared, block.gated_shared() ? block.shared_gate : Floats(), x, y);
  }
  return y;
}

inline const BlockSpec& block_named(const std::string& name) {
  for (const BlockSpec& s : kBlocks) {
    if (name == s.name) return s;
  }
  throw std::runtime_error("no block " + name);
}

}  // namespace moesaic::testing
