#pragma once

/// How one GGUF architecture states its MoE layers: which model it stores (model.hpp), and which
/// keys and tensors of the file say more. presets.cpp is the table, read_preset.cpp applies a row
/// to a file, describe_presets.cpp puts the rows into words.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "model/block_reader.hpp"
#include "model/model.hpp"

namespace moesaic {

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

/// One architecture. A `..._key` says whether the file is asked before the model. The keys of
/// group-limited selection (expert_group_count, expert_group_used_count) are read for all.
struct Preset {
  std::string_view architecture = {};
  std::string_view source = {};  ///< where the keys were read: a file of llama.cpp's src/models

  /// The model types of transformers whose checkpoints llama.cpp's converter stores under this
  /// architecture and python/moesaic/hf_config reads, with spaces between.
  std::string_view model_types = {};
  const Model* model = nullptr;
  /// Another model stored under this architecture, for a file whose score is the sigmoid or that
  /// has a selection bias; null where there is none.
  const Model* sigmoid_model = nullptr;

  Use score_key = Use::Ignored;        ///< expert_gating_func
  bool sigmoid_if_flash = false;       ///< GLM-4.7-Flash has no such key and is known by its sizes
  bool hash_layers = false;            ///< blocks below hash_layer_count route by token id
  Use renormalize_key = Use::Ignored;  ///< expert_weights_norm
  bool absent_renormalize = false;     ///< what the absence of that key means
  Use scale_key = Use::Ignored;        ///< expert_weights_scale
  Use limit_key = Use::Ignored;        ///< swiglu_clamp_exp; 0 makes it plain SwiGlu
  double absent_limit = 0.0;           ///< what the absence of that key means
  bool routed_limit_for_shared =
      false;  ///< where swiglu_clamp_shexp is absent; else that means off
  /// Tensor exp_probs_b, where llama.cpp's loader asks for it otherwise than the model does.
  std::optional<Use> selection_bias = {};

  WidthFallback width = WidthFallback::FeedForward;
  Use shared_tensors = Use::Ignored;  ///< ffn_{gate,up,down}_shexp
  SharedWidth shared_width = SharedWidth::Tensors;
  std::string_view latent_key = {};  ///< key of the latent width; empty: no latent experts

  /// Tensors of the block that are its caller's, by their names before the first dot, with spaces
  /// between. All others that look like parts of the layer are used or refused.
  std::string_view others = {};
  std::string_view notes = {};    ///< what the layer leaves to its caller
  std::string_view missing = {};  ///< the part without which it cannot run

  /// Whether a file of `stored` has the tensor exp_probs_b.
  Use bias_use(const Model& stored) const { return selection_bias.value_or(stored.selection_bias); }
};

std::span<const Preset> presets() noexcept;

/// The row of an architecture by any published spelling; null for an unknown one.
const Preset* find_preset(std::string_view architecture);
/// Known architectures that resemble this name, the nearest first; at most three.
std::vector<std::string> near_architectures(std::string_view architecture);

/// MoeConfig::from_gguf of the block. Errors: as there.
MoeConfig read_config(const BlockReader& block);
/// MoeConfig::from_gguf of the block by this row.
MoeConfig config_from_preset(const BlockReader& block, const Preset& preset);
MoeConfig config_from_preset(const GgufFile& file, std::int32_t layer, const Preset& preset);

}  // namespace moesaic
