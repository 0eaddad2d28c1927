#pragma once

/// How one GGUF architecture states its router: what its metadata says, and what it leaves unsaid.

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

/// One architecture. A `..._key` says which metadata key overrides the value before it.
struct Preset {
  std::string_view architecture;
  std::string_view source;  ///< where the facts were read

  ScoreFunction score = ScoreFunction::Softmax;
  Use score_key = Use::Ignored;  ///< expert_gating_func
  bool select_on_logits = false;
  bool renormalize = true;
  Use renormalize_key = Use::Ignored;  ///< expert_weights_norm
  Use scale_key = Use::Ignored;        ///< expert_weights_scale
  Use group_keys = Use::Ignored;       ///< expert_group_count, expert_group_used_count
  WeightOn weight_on = WeightOn::Output;
  Use router_bias = Use::Ignored;     ///< tensor ffn_gate_inp.bias
  Use selection_bias = Use::Ignored;  ///< tensor exp_probs_b

  ActivationKind activation = ActivationKind::SwiGlu;
  Use limit_key = Use::Ignored;  ///< swiglu_clamp_exp; a limit that is off makes it plain SwiGlu

  WidthFallback width = WidthFallback::FeedForward;
  SharedKind shared = SharedKind::None;
  Use shared_tensors = Use::Ignored;  ///< ffn_{gate,up,down}_shexp
};

/// Sorted by architecture.
std::span<const Preset> presets() noexcept;

/// MoeConfig::from_gguf with the row given. Errors: as there.
MoeConfig config_from_preset(const GgufFile& file, std::int32_t layer, const Preset& preset);

}  // namespace moesaic
