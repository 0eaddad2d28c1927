#pragma once

/// How one GGUF architecture states its MoE layers: what its metadata says, and what it leaves
/// unsaid. presets.cpp is the table, read_preset.cpp applies a row to a file, describe_presets.cpp
/// puts the rows into words.

#include <cstdint>
#include <span>
#include <string_view>

#include "moesaic/config.hpp"

namespace moesaic {

/// Whether a metadata key or tensor is looked at. An ignored key may stand in the file without
/// effect; an ignored tensor is a contradiction, for its numbers would be lost.
enum class Use : std::uint8_t { Ignored, Optional, Required };

/// The expert width when `expert_feed_forward_length` is absent.
enum class WidthFallback : std::uint8_t {
  FeedForward,         ///< feed_forward_length
  FeedForwardOverTopK  ///< feed_forward_length / expert_used_count
};

/// What says how wide the shared experts are together; the tensors where the keys are absent.
enum class SharedWidth : std::uint8_t {
  Tensors,
  Key,           ///< expert_shared_feed_forward_length
  Count,         ///< expert_shared_count times the width of an expert
  KeyTimesCount  ///< the product of both keys
};

/// The clamp of shared experts where routed ones have one.
enum class SharedLimit : std::uint8_t {
  None,
  Key,           ///< swiglu_clamp_shexp
  KeyElseRouted  ///< the same; when absent, the limit of the routed experts
};

/// One architecture. A `..._key` says which metadata key overrides the value before it. The keys of
/// group-limited selection (expert_group_count, expert_group_used_count) are read for all.
struct Preset {
  std::string_view architecture = {};
  std::string_view source = {};  ///< where the facts were read: a file of llama.cpp's src/models

  ScoreFunction score = ScoreFunction::Softmax;
  Use score_key = Use::Ignored;   ///< expert_gating_func
  bool sigmoid_if_flash = false;  ///< GLM-4.7-Flash has no such key and is known by its sizes
  SelectOn select_on = SelectOn::Scores;
  bool hash_layers = false;  ///< blocks below hash_layer_count route by token id
  bool renormalize = true;
  Use renormalize_key = Use::Ignored;  ///< expert_weights_norm
  Use scale_key = Use::Ignored;        ///< expert_weights_scale
  WeightOn weight_on = WeightOn::Output;
  Use router_bias = Use::Ignored;     ///< tensor ffn_gate_inp.bias
  Use selection_bias = Use::Ignored;  ///< tensor exp_probs_b

  ActivationKind activation = ActivationKind::SwiGlu;
  Use limit_key = Use::Ignored;  ///< swiglu_clamp_exp; absent or off makes it plain SwiGlu
  SharedLimit shared_limit = SharedLimit::None;

  WidthFallback width = WidthFallback::FeedForward;
  SharedKind shared = SharedKind::None;
  Use shared_tensors = Use::Ignored;  ///< ffn_{gate,up,down}_shexp
  SharedWidth shared_width = SharedWidth::Tensors;

  std::string_view latent_key = {};  ///< key of the latent width; empty: no latent experts
  bool input_norm = false;           ///< x is the residual stream, the experts read its norm
  RouterInput router_input = RouterInput::Experts;

  std::string_view notes = {};    ///< what the layer leaves to its caller
  std::string_view missing = {};  ///< the part without which it cannot run
};

std::span<const Preset> presets() noexcept;

/// MoeConfig::from_gguf with the row given. Errors: as there.
MoeConfig config_from_preset(const GgufFile& file, std::int32_t layer, const Preset& preset);

}  // namespace moesaic
