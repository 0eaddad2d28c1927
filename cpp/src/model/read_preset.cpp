#include <algorithm>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/nearest.hpp"
#include "model/layer_reader.hpp"
#include "model/presets.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic {
namespace {

/// GGUF's expert_gating_func; empty for 0, llama.cpp's "none", which it takes as a key not set.
std::optional<ScoreFunction> score_function(const LayerReader& read, std::int64_t id) {
  switch (id) {
    case 0:
      return std::nullopt;
    case 1:
      return ScoreFunction::Softmax;
    case 2:
      return ScoreFunction::Sigmoid;
    case 3:
      return ScoreFunction::SoftmaxSelected;
    case 4:
      return ScoreFunction::SqrtSoftplus;
    default:
      throw FormatError(read.problem(read.key("expert_gating_func"), "0 to 4", std::to_string(id)));
  }
}

/// GLM-4.7-Flash is stored as deepseek2 without a score key; its depth and vocabulary tell.
bool is_glm_flash(const GgufFile& file, const LayerReader& read) {
  constexpr std::int64_t kVocabulary = 154880;
  const std::int64_t blocks = file.integer(read.key("block_count")).value_or(0);
  const GgufTensor* const embedding = file.tensor("token_embd.weight");
  return (blocks == 47 || blocks == 48) && embedding != nullptr && embedding->ne(1) == kVocabulary;
}

/// A size of this layer. For a block behind the trunk of a per-layer array, the value that all
/// layers with experts share; empty where they share none.
std::optional<std::int64_t> layer_size(const GgufFile& file, const LayerReader& read,
                                       std::string_view name) {
  if (const auto own = read.size(name)) return own;
  const GgufEntry* const entry = file.find(read.key(name));
  if (entry == nullptr || entry->type != GgufType::Array) return std::nullopt;
  std::vector<std::int64_t> values = std::get<GgufArray>(entry->value).as_integers();
  std::erase(values, 0);  // dense layers
  if (values.empty() || std::ranges::count(values, values.front()) != std::ssize(values)) {
    return std::nullopt;
  }
  return values.front();
}

std::int32_t required_layer_size(const GgufFile& file, const LayerReader& read,
                                 std::string_view name) {
  const auto value = layer_size(file, read, name);
  require<FormatError>(value.has_value(), [&] { return read.missing(read.key(name)); });
  return static_cast<std::int32_t>(*value);
}

std::int64_t expert_width(const GgufFile& file, const LayerReader& read, WidthFallback fallback,
                          std::int32_t top_k, const MoeTensors& tensors) {
  constexpr std::string_view kLength = "expert_feed_forward_length";
  if (const auto width = layer_size(file, read, kLength)) return *width;
  // A key that is there and says nothing of this block leaves the word to the block.
  const bool beyond_trunk = file.find(read.key(kLength)) != nullptr;
  if (beyond_trunk && tensors.down != nullptr) return tensors.down->ne(0);
  const std::int64_t width = read.required_size("feed_forward_length");
  if (fallback == WidthFallback::FeedForward) return width;
  require<FormatError>(width % top_k == 0, [&] {
    return read.problem(read.key(kLength),
                        "a value, or a feed_forward_length that is a multiple of " +
                            std::to_string(top_k) + " experts used",
                        std::to_string(width));
  });
  return width / top_k;
}

void read_groups(const LayerReader& read, LayerValues& values) {
  const std::int64_t groups = read.integer("expert_group_count", Use::Optional).value_or(1);
  if (groups <= 1) return;
  const std::int64_t used = read.required_size("expert_group_used_count");
  const std::int32_t experts = values.num_experts;
  require<FormatError>(groups <= experts && experts % groups == 0 && used <= groups, [&] {
    return read.problem(
        read.key("expert_group_count"),
        "a divisor of " + std::to_string(experts) + " experts, not below expert_group_used_count",
        std::to_string(groups) + ", " + std::to_string(used) + " used");
  });
  values.num_groups = static_cast<std::int32_t>(groups);
  values.groups_used = static_cast<std::int32_t>(used);
}

/// Blocks below hash_layer_count take their experts from a table by token id.
void read_table(const LayerReader& read, const Preset& preset, const MoeTensors& tensors,
                LayerValues& values) {
  const std::int64_t layers =
      read.integer("hash_layer_count", preset.hash_layers ? Use::Optional : Use::Ignored)
          .value_or(0);
  const bool hashed = values.layer < layers;
  read.check_use(tensors.token_experts, "ffn_gate_tid2eid.weight",
                 hashed ? Use::Required : Use::Ignored);
  if (!hashed) return;
  values.vocab_size = tensors.token_experts->ne(1);
  read.check_shape(tensors.token_experts, {values.vocab_size, values.top_k});
}

/// What the keys say about the score; empty where they say nothing.
std::optional<ScoreFunction> read_score(const GgufFile& file, const LayerReader& read,
                                        const Preset& preset) {
  if (const auto id = read.integer("expert_gating_func", preset.score_key)) {
    const std::optional<ScoreFunction> score = score_function(read, *id);
    require<FormatError>(score || preset.score_key != Use::Required, [&] {
      return read.problem(read.key("expert_gating_func"), "1 to 4", "0, which means not set");
    });
    if (score) return score;
  }
  if (preset.sigmoid_if_flash && is_glm_flash(file, read)) return ScoreFunction::Sigmoid;
  return std::nullopt;
}

/// Which of the models that share an architecture the file holds.
const Model& stored_model(const Preset& preset, std::optional<ScoreFunction> score,
                          const MoeTensors& tensors) {
  const bool sigmoid = score == ScoreFunction::Sigmoid || tensors.selection_bias != nullptr;
  return sigmoid && preset.sigmoid_model != nullptr ? *preset.sigmoid_model : *preset.model;
}

void read_router(const LayerReader& read, const Preset& preset, const Model& model,
                 const MoeTensors& tensors, LayerValues& values) {
  if (preset.renormalize_key != Use::Ignored) {
    values.renormalize = read.boolean("expert_weights_norm", preset.renormalize_key)
                             .value_or(preset.absent_renormalize);
  }
  values.scale = read.number("expert_weights_scale", preset.scale_key).value_or(1.0);
  read_groups(read, values);
  read_table(read, preset, tensors, values);

  const bool hashed = values.vocab_size > 0;
  read.check_use(tensors.router_bias, "ffn_gate_inp.bias", model.router_bias);
  read.check_use(tensors.selection_bias, "exp_probs_b.bias",
                 hashed ? Use::Optional : preset.bias_use(model));
  values.router_bias = read.vector(tensors.router_bias, values.num_experts);
  // A table leaves nothing to select.
  if (!hashed) values.selection_bias = read.vector(tensors.selection_bias, values.num_experts);
}

void read_activations(const LayerReader& read, const Preset& preset, const Model& model,
                      LayerValues& values) {
  if (model.activation == ActivationKind::SiTu) {
    values.beta = *read.number("activation.situ_beta", Use::Required);
    // A negative linear_beta means none, as 0 does.
    values.linear_beta = std::max(0.0, *read.number("activation.situ_linear_beta", Use::Required));
    require<FormatError>(static_cast<float>(*values.beta) > 0.0F, [&] {
      return read.problem(read.key("activation.situ_beta"), "a positive number",
                          std::to_string(*values.beta));
    });
  }
  values.limit = read.number("swiglu_clamp_exp", preset.limit_key);
  if (!values.limit && preset.absent_limit > 0.0) values.limit = preset.absent_limit;
  const bool shared_key = preset.limit_key != Use::Ignored && model.shared_clamped &&
                          preset.shared_tensors != Use::Ignored;
  values.shared_limit =
      read.number("swiglu_clamp_shexp", shared_key ? Use::Optional : Use::Ignored);
  if (!values.shared_limit && preset.routed_limit_for_shared) values.shared_limit = values.limit;
}

void read_inputs(const LayerReader& read, const Preset& preset, const Model& model,
                 const MoeTensors& tensors, LayerValues& values) {
  const std::int64_t hidden = values.hidden_size;
  if (model.input_norm) {
    read.check_use(tensors.input_norm, "pre_ffw_norm_2.weight or ffn_norm_exps.weight",
                   Use::Required);
    read.check_shape(tensors.input_norm, {hidden});
  }
  const bool own_norm = model.router_input == RouterInput::Norm;
  read.check_use(tensors.router_scale, "ffn_gate_inp.scale",
                 own_norm ? Use::Required : Use::Ignored);
  read.check_shape(tensors.router_scale, {hidden});

  std::int64_t latent =
      preset.latent_key.empty() ? 0 : read.integer(preset.latent_key, Use::Optional).value_or(0);
  require<FormatError>(latent >= 0, [&] {
    return read.problem(read.key(preset.latent_key), "a width", std::to_string(latent));
  });
  // Blocks that predict further tokens run their experts at full width where they lack projections.
  if (tensors.latent_down == nullptr && tensors.latent_up == nullptr && latent != hidden) {
    latent = 0;
  }
  values.latent_size = latent;
  const Use use = latent > 0 ? Use::Required : Use::Ignored;
  read.check_use(tensors.latent_down, "ffn_latent_down.weight or ffn_routed_down.weight", use);
  read.check_use(tensors.latent_up, "ffn_latent_up.weight or ffn_routed_up.weight", use);
  read.check_use(tensors.latent_norm, "ffn_routed_norm.weight",
                 latent > 0 ? Use::Optional : Use::Ignored);
  read.check_shape(tensors.latent_down, {latent, hidden});
  read.check_shape(tensors.latent_up, {hidden, latent});
  read.check_shape(tensors.latent_norm, {latent});
  values.latent_norm = tensors.latent_norm != nullptr;
  if (model.input_norm || own_norm || values.latent_norm) {
    values.norm_eps = *read.number("attention.layer_norm_rms_epsilon", Use::Required);
  }
}

void check_experts(const LayerReader& read, const MoeTensors& tensors, const LayerValues& values) {
  const std::int64_t experts = values.num_experts;
  const std::int64_t hidden = values.latent_size > 0 ? values.latent_size : values.hidden_size;
  const std::int64_t width = values.intermediate_size;
  read.check_shape(tensors.router, {experts, values.hidden_size});
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

/// What the keys say; the tensors' own width where they say nothing.
std::int64_t shared_width(const LayerReader& read, SharedWidth rule, std::int64_t expert_width,
                          std::int64_t stored) {
  constexpr const char* kLength = "expert_shared_feed_forward_length";
  constexpr const char* kCount = "expert_shared_count";
  const auto times_count = [&](std::int64_t width, std::int64_t count) {
    require<FormatError>(width * count <= std::numeric_limits<std::int32_t>::max(), [&] {
      return read.problem(read.key(kCount), "a width within int32 for all shared experts together",
                          std::to_string(count) + " of " + std::to_string(width));
    });
    return width * count;
  };
  switch (rule) {
    case SharedWidth::Tensors:
      break;
    case SharedWidth::Key:
      return read.size(kLength).value_or(stored);
    case SharedWidth::Count:
      if (const auto count = read.size(kCount)) return times_count(expert_width, *count);
      break;
    case SharedWidth::KeyTimesCount:
      if (const auto key = read.size(kLength)) {
        return times_count(*key, read.size(kCount).value_or(1));
      }
      break;
  }
  return stored;
}

void read_shared(const LayerReader& read, const Preset& preset, const Model& model,
                 const MoeTensors& tensors, LayerValues& values) {
  read.check_use(tensors.shared_up, "ffn_up_shexp.weight", preset.shared_tensors);
  if (tensors.shared_up == nullptr) return;
  read.check_use(tensors.shared_down, "ffn_down_shexp.weight", Use::Required);
  const std::int64_t hidden = values.hidden_size;
  const std::int64_t width =
      shared_width(read, preset.shared_width, values.intermediate_size, tensors.shared_down->ne(0));
  values.shared_intermediate_size = width;

  const bool gated = Activation{model.activation}.gated();
  // Granite's sliding-window form stores gate and up as one.
  const bool fused =
      gated && tensors.shared_gate == nullptr && tensors.shared_up->ne(1) == 2 * width;
  const Use router = model.shared == SharedKind::SigmoidGated ? Use::Required : Use::Ignored;
  read.check_use(tensors.shared_gate, "ffn_gate_shexp.weight",
                 gated && !fused ? Use::Required : Use::Ignored);
  read.check_use(tensors.shared_router, "ffn_gate_inp_shexp.weight", router);
  read.check_shape(tensors.shared_gate, {width, hidden});
  read.check_shape(tensors.shared_up, {fused ? 2 * width : width, hidden});
  read.check_shape(tensors.shared_down, {hidden, width});
  read.check_shape(tensors.shared_router, {hidden});
}

/// `layer` has all expert tensors.
void check_layer(const GgufFile& file, const LayerReader& read, const MoeTensors& tensors,
                 std::int32_t layer) {
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
}

void check_parts(const LayerReader& read, const Preset& preset) {
  require<UnsupportedError>(preset.missing.empty(), [&] {
    Problem problem =
        read.problem(std::string(preset.architecture), "layers of parts that are available",
                     std::string(preset.missing));
    problem.hint = "ExpertStack::load_from_gguf opens the experts alone";
    return problem;
  });
}

}  // namespace

MoeConfig config_from_preset(const BlockReader& block, const Preset& preset) {
  const GgufFile& file = block.file();
  const std::int32_t layer = block.layer();
  const LayerReader read(
      block, file.string("general.architecture").value_or(std::string(preset.architecture)));
  check_parts(read, preset);
  const MoeTensors tensors = find_moe_tensors(file, layer);
  check_layer(file, read, tensors, layer);

  LayerValues values;
  values.architecture = preset.architecture;
  values.layer = layer;
  values.hidden_size = read.required_size("embedding_length");
  values.num_experts = required_layer_size(file, read, "expert_count");
  values.top_k = required_layer_size(file, read, "expert_used_count");
  values.intermediate_size = expert_width(file, read, preset.width, values.top_k, tensors);
  values.score = read_score(file, read, preset);
  const Model& model = stored_model(preset, values.score, tensors);
  read_activations(read, preset, model, values);
  read_router(read, preset, model, tensors, values);
  read_inputs(read, preset, model, tensors, values);
  check_experts(read, tensors, values);
  read_shared(read, preset, model, tensors, values);
  try {
    return make_config(model, std::move(values));
  } catch (const ConfigError& error) {
    throw FormatError(read.problem("router", "consistent metadata", error.what()));
  }
}

MoeConfig config_from_preset(const GgufFile& file, std::int32_t layer, const Preset& preset) {
  return config_from_preset(BlockReader(file, layer), preset);
}

MoeConfig read_config(const BlockReader& block) {
  const GgufFile& file = block.file();
  const auto architecture = file.string("general.architecture");
  require<FormatError>(architecture.has_value(), [&] {
    return Problem{"MoeConfig::from_gguf", "general.architecture", "a value", "nothing",
                   file.path().string()};
  });
  const Preset* const preset = find_preset(*architecture);
  require<UnsupportedError>(preset != nullptr, [&] {
    const auto list = [](const std::vector<std::string>& names) {
      std::string text;
      for (const std::string& name : names) text += (text.empty() ? "" : ", ") + name;
      return text;
    };
    // The list of all is too long for a message.
    const std::string near = list(near_architectures(*architecture));
    return Problem{"MoeConfig::from_gguf", "general.architecture",
                   (near.empty() ? "" : "perhaps " + near + "; ") + "one of known_architectures()",
                   quoted_word(*architecture),
                   "from_gguf(..., config=) takes a MoeConfig of your own"};
  });
  return config_from_preset(block, *preset);
}

MoeConfig MoeConfig::from_gguf(const GgufFile& file, std::int32_t layer) {
  return read_config(BlockReader(file, layer));
}

}  // namespace moesaic
