#include "route/presets.hpp"

#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic {
namespace {

// Renormalisation and score of these families stand in no key; llama.cpp's graphs fix them.
constexpr Preset kPresets[] = {
    {.architecture = "llama",  // Mixtral
     .source = "llama.cpp src/models/llama.cpp",
     .shared = SharedKind::Plain,
     .shared_tensors = Use::Optional},
    {.architecture = "olmoe", .source = "llama.cpp src/models/olmoe.cpp", .renormalize = false},
    {.architecture = "qwen2moe",
     .source = "llama.cpp src/models/qwen2moe.cpp",
     .renormalize = false,
     .width = WidthFallback::FeedForwardOverTopK,
     .shared = SharedKind::SigmoidGated,
     .shared_tensors = Use::Required},
    {.architecture = "qwen3moe", .source = "llama.cpp src/models/qwen3moe.cpp"},
};

/// llama.cpp renormalises with max(sum, smallest normal f16).
constexpr float kNormFloor = 6.103515625e-5F;

/// A clamp limit up to this is off.
constexpr double kLimitOff = 1e-6;

/// Looks keys and tensors of one layer up, with errors that name them.
class LayerReader {
 public:
  LayerReader(const GgufFile& file, std::int32_t layer, std::string_view architecture)
      : file_(file), layer_(layer), prefix_(std::string(architecture) + ".") {}

  std::string key(std::string_view name) const { return prefix_ + std::string(name); }
  std::string tensor_name(std::string_view name) const {
    return "blk." + std::to_string(layer_) + "." + std::string(name);
  }

  /// A size of this layer: at least 1 and within int32. Empty when the key is absent.
  std::optional<std::int64_t> size(std::string_view name) const {
    const auto value = file_.integer_for_layer(key(name), layer_);
    if (value) check_size(name, *value);
    return value;
  }
  std::int64_t required_size(std::string_view name) const {
    const auto value = size(name);
    require<FormatError>(value.has_value(), [&] { return missing(key(name)); });
    return *value;
  }
  /// The value of a key that is looked at; empty when it is ignored or absent.
  std::optional<double> number(std::string_view name, Use use) const {
    if (use == Use::Ignored) return std::nullopt;
    return checked(file_.number_for_layer(key(name), layer_), name, use);
  }
  std::optional<std::int64_t> integer(std::string_view name, Use use) const {
    if (use == Use::Ignored) return std::nullopt;
    return checked(file_.integer_for_layer(key(name), layer_), name, use);
  }
  std::optional<bool> boolean(std::string_view name, Use use) const {
    if (use == Use::Ignored) return std::nullopt;
    return checked(file_.boolean(key(name)), name, use);
  }

  Problem problem(std::string what, std::string expected, std::string got) const {
    return {"MoeConfig::from_gguf", std::move(what), std::move(expected), std::move(got),
            file_.path().string()};
  }
  Problem missing(const std::string& what) const { return problem(what, "a value", "nothing"); }

  /// Throws unless an absent or present tensor agrees with its use.
  void check_use(const GgufTensor* tensor, std::string_view name, Use use) const {
    require<FormatError>(tensor != nullptr || use != Use::Required,
                         [&] { return missing(tensor_name(name)); });
    require<FormatError>(tensor == nullptr || use != Use::Ignored, [&] {
      return problem(tensor->name, "no such tensor in this architecture", "one");
    });
  }

  void check_shape(const GgufTensor* tensor, std::initializer_list<std::int64_t> shape) const {
    if (tensor == nullptr) return;
    const std::int64_t* dims = tensor->shape;
    if (std::cmp_equal(shape.size(), tensor->rank) &&
        std::equal(shape.begin(), shape.end(), dims)) {
      return;
    }
    throw FormatError(problem(tensor->name, describe(shape.begin(), shape.end()),
                              describe(dims, dims + tensor->rank)));
  }

  /// Empty when there is no tensor.
  std::vector<float> vector(const GgufTensor* tensor, std::int64_t count) const {
    if (tensor == nullptr) return {};
    check_shape(tensor, {count});
    const GgufBytes bytes = file_.bytes(*tensor);
    std::vector<float> values(static_cast<std::size_t>(count));
    dequantize_row(tensor->quant, bytes.bytes.data(), values.data(), count);
    return values;
  }

 private:
  void check_size(std::string_view name, std::int64_t value) const {
    require<FormatError>(value >= 1 && value <= std::numeric_limits<std::int32_t>::max(), [&] {
      return problem(key(name), "a size of at least 1 for block " + std::to_string(layer_),
                     std::to_string(value));
    });
  }
  template <class T>
  std::optional<T> checked(std::optional<T> value, std::string_view name, Use use) const {
    require<FormatError>(value.has_value() || use == Use::Optional,
                         [&] { return missing(key(name)); });
    return value;
  }
  static std::string describe(const std::int64_t* begin, const std::int64_t* end) {
    std::string text = "[";
    for (const std::int64_t* at = begin; at != end; ++at) {
      if (at != begin) text += ", ";
      text += std::to_string(*at);
    }
    return text + "]";
  }

  const GgufFile& file_;
  std::int32_t layer_;
  std::string prefix_;
};

/// GGUF's expert_gating_func.
ScoreFunction score_function(const LayerReader& read, std::int64_t id) {
  switch (id) {
    case 1:
      return ScoreFunction::Softmax;
    case 2:
      return ScoreFunction::Sigmoid;
    case 3:
      return ScoreFunction::SoftmaxSelected;
    case 4:
      return ScoreFunction::SqrtSoftplus;
    default:
      throw FormatError(read.problem(read.key("expert_gating_func"), "1 to 4", std::to_string(id)));
  }
}

std::int64_t expert_width(const LayerReader& read, WidthFallback fallback, std::int32_t top_k) {
  if (const auto width = read.size("expert_feed_forward_length")) return *width;
  const std::int64_t width = read.required_size("feed_forward_length");
  return fallback == WidthFallback::FeedForwardOverTopK ? width / top_k : width;
}

void read_router(const LayerReader& read, const Preset& preset, const MoeTensors& tensors,
                 MoeConfig& config) {
  RouterConfig& router = config.router;
  router.num_experts = config.num_experts;
  router.top_k = config.top_k;
  router.score = preset.score;
  if (const auto id = read.integer("expert_gating_func", preset.score_key)) {
    router.score = score_function(read, *id);
  }
  router.select_on_logits = preset.select_on_logits;
  router.renormalize =
      read.boolean("expert_weights_norm", preset.renormalize_key).value_or(preset.renormalize);
  router.guard = NormGuard::ClampMin;
  router.guard_eps = kNormFloor;
  router.scale =
      static_cast<float>(read.number("expert_weights_scale", preset.scale_key).value_or(1.0));
  router.weight_on = preset.weight_on;

  const std::int64_t groups = read.integer("expert_group_count", preset.group_keys).value_or(1);
  if (groups > 1) {
    const std::int64_t used = read.required_size("expert_group_used_count");
    require<FormatError>(
        groups <= router.num_experts && router.num_experts % groups == 0 && used <= groups, [&] {
          return read.problem(read.key("expert_group_count"),
                              "a divisor of " + std::to_string(router.num_experts) +
                                  " experts, not below expert_group_used_count",
                              std::to_string(groups) + ", " + std::to_string(used) + " used");
        });
    router.num_groups = static_cast<std::int32_t>(groups);
    router.groups_used = static_cast<std::int32_t>(used);
  }

  read.check_use(tensors.router_bias, "ffn_gate_inp.bias", preset.router_bias);
  read.check_use(tensors.selection_bias, "exp_probs_b.bias", preset.selection_bias);
  router.router_bias = read.vector(tensors.router_bias, router.num_experts);
  router.selection_bias = read.vector(tensors.selection_bias, router.num_experts);
  try {
    router.validate();
  } catch (const ConfigError& error) {
    throw FormatError(read.problem("router", "consistent metadata", error.what()));
  }
}

void check_experts(const LayerReader& read, const MoeTensors& tensors, const MoeConfig& config) {
  const std::int64_t experts = config.num_experts;
  const std::int64_t hidden = config.hidden_size;
  const std::int64_t width = config.intermediate_size;
  read.check_shape(tensors.router, {experts, hidden});
  read.check_shape(tensors.gate, {experts, width, hidden});
  read.check_shape(tensors.up, {experts, width, hidden});
  read.check_shape(tensors.gate_up, {experts, 2 * width, hidden});
  read.check_shape(tensors.down, {experts, hidden, width});
  if (tensors.expert_down.empty()) return;
  for (const auto* role : {&tensors.expert_gate, &tensors.expert_up, &tensors.expert_down}) {
    require<FormatError>(role->empty() || std::cmp_equal(role->size(), experts), [&] {
      return read.problem(read.tensor_name("ffn_*.E.weight"),
                          std::to_string(experts) + " experts (" + read.key("expert_count") + ")",
                          std::to_string(role->size()));
    });
  }
  for (const GgufTensor* tensor : tensors.expert_gate) read.check_shape(tensor, {width, hidden});
  for (const GgufTensor* tensor : tensors.expert_up) read.check_shape(tensor, {width, hidden});
  for (const GgufTensor* tensor : tensors.expert_down) read.check_shape(tensor, {hidden, width});
}

void read_shared(const LayerReader& read, const Preset& preset, const MoeTensors& tensors,
                 MoeConfig& config) {
  read.check_use(tensors.shared_up, "ffn_up_shexp.weight", preset.shared_tensors);
  if (tensors.shared_up == nullptr) return;
  config.shared = preset.shared;
  config.shared_intermediate_size =
      read.size("expert_shared_feed_forward_length").value_or(tensors.shared_up->shape[0]);

  const std::int64_t hidden = config.hidden_size;
  const std::int64_t width = config.shared_intermediate_size;
  const Use gate = config.activation.gated() ? Use::Required : Use::Ignored;
  const Use router = preset.shared == SharedKind::SigmoidGated ? Use::Required : Use::Ignored;
  read.check_use(tensors.shared_gate, "ffn_gate_shexp.weight", gate);
  read.check_use(tensors.shared_down, "ffn_down_shexp.weight", Use::Required);
  read.check_use(tensors.shared_router, "ffn_gate_inp_shexp.weight", router);
  read.check_shape(tensors.shared_gate, {width, hidden});
  read.check_shape(tensors.shared_up, {width, hidden});
  read.check_shape(tensors.shared_down, {hidden, width});
  read.check_shape(tensors.shared_router, {hidden});
}

}  // namespace

std::span<const Preset> presets() noexcept { return kPresets; }

std::vector<std::string> known_architectures() {
  std::vector<std::string> names;
  for (const Preset& preset : kPresets) names.emplace_back(preset.architecture);
  return names;
}

MoeConfig config_from_preset(const GgufFile& file, std::int32_t layer, const Preset& preset) {
  const LayerReader read(file, layer, preset.architecture);
  const MoeTensors tensors = find_moe_tensors(file, layer);
  const std::vector<std::int32_t> layers = file.moe_layers();
  require<ShapeError>(std::ranges::binary_search(layers, layer), [&] {
    return read.problem("block " + std::to_string(layer),
                        layers.empty() ? "a file with experts"
                                       : "a block with experts, " + std::to_string(layers.front()) +
                                             " to " + std::to_string(layers.back()),
                        "one without");
  });
  require<FormatError>(tensors.has_experts(), [&] {
    return read.problem("block " + std::to_string(layer),
                        "ffn_down_exps.weight with ffn_up_exps.weight or ffn_gate_up_exps.weight",
                        "only a part of them");
  });

  MoeConfig config;
  config.architecture = preset.architecture;
  config.layer = layer;
  config.hidden_size = read.required_size("embedding_length");
  config.num_experts = static_cast<std::int32_t>(read.required_size("expert_count"));
  config.top_k = static_cast<std::int32_t>(read.required_size("expert_used_count"));
  config.intermediate_size = expert_width(read, preset.width, config.top_k);
  config.activation.kind = preset.activation;
  if (const auto limit = read.number("swiglu_clamp_exp", preset.limit_key)) {
    config.activation.limit = static_cast<float>(*limit);
    if (*limit <= kLimitOff) config.activation.kind = ActivationKind::SwiGlu;
  }
  read_router(read, preset, tensors, config);
  check_experts(read, tensors, config);
  read_shared(read, preset, tensors, config);
  return config;
}

MoeConfig MoeConfig::from_gguf(const GgufFile& file, std::int32_t layer) {
  const auto architecture = file.string("general.architecture");
  require<FormatError>(architecture.has_value(), [&] {
    return Problem{"MoeConfig::from_gguf", "general.architecture", "a value", "nothing",
                   file.path().string()};
  });
  const auto* preset = std::ranges::find(kPresets, *architecture, &Preset::architecture);
  require<UnsupportedError>(preset != std::end(kPresets), [&] {
    std::string known;
    for (const Preset& p : kPresets)
      known += (known.empty() ? "" : ", ") + std::string(p.architecture);
    return Problem{"MoeConfig::from_gguf", "general.architecture", "one of " + known,
                   "\"" + *architecture + "\"", "fill in a MoeConfig by hand"};
  });
  return config_from_preset(file, layer, *preset);
}

}  // namespace moesaic
