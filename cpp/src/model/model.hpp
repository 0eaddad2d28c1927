#pragma once

/// What the MoE layers of a model are, however the model is stored. A file adds values
/// (LayerValues) under its own keys, and one function makes the configuration of both. So a GGUF
/// file and a Hugging Face checkpoint of one model cannot disagree about its router.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/config.hpp"

namespace moesaic {

/// Whether a key or tensor is looked at. An ignored key may stand in a file without effect; an
/// ignored tensor is a contradiction, for its numbers would be lost.
enum class Use : std::uint8_t { Ignored, Optional, Required };

/// One model, or several whose layers are alike. The values here hold where a file says nothing.
struct Model {
  std::string_view name = {};  ///< transformers' model_type where it has one
  /// Where the facts were read: under transformers' src/transformers/models or llama.cpp's
  /// src/models.
  std::string_view source = {};

  ScoreFunction score = ScoreFunction::Softmax;
  SelectOn select_on = SelectOn::Scores;
  GroupReduce group_reduce = GroupReduce::Top2Sum;
  GroupMask group_mask = GroupMask::MinusInfinity;
  bool renormalize = true;
  NormGuard guard = NormGuard::None;
  float guard_eps = 0.0F;
  WeightOn weight_on = WeightOn::Output;
  Use router_bias = Use::Ignored;
  Use selection_bias = Use::Ignored;

  ActivationKind activation = ActivationKind::SwiGlu;
  bool shared_clamped = true;  ///< whether a clamp of the routed experts holds for shared ones too
  SharedKind shared = SharedKind::None;  ///< kind of the shared experts, where there are any
  bool averaged = false;  ///< y is the mean of the routed experts' and the shared experts' sums

  bool input_norm = false;  ///< x is the residual stream, the experts read its norm
  RouterInput router_input = RouterInput::Experts;
};

/// The table, in the order of its names.
std::span<const Model> models() noexcept;
/// Throws ConfigError with the known names.
const Model& find_model(std::string_view name);

/// What a file says about one layer. An empty optional means that it says nothing, and the model's
/// value holds.
struct LayerValues {
  std::string architecture;  ///< as the file names it
  std::int32_t layer = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int32_t num_experts = 0;  ///< with weights
  std::int32_t top_k = 0;

  std::optional<ScoreFunction> score;
  std::optional<bool> renormalize;
  std::optional<double> guard_eps;
  double scale = 1.0;
  std::int32_t num_groups = 1;
  std::int32_t groups_used = 1;
  std::int32_t identity_experts = 0;
  std::int64_t vocab_size = 0;  ///< rows of the table that gives this layer's ids; 0: it selects
  std::vector<float> router_bias;
  std::vector<float> selection_bias;

  std::optional<ActivationKind> activation;
  std::optional<double> limit;                ///< L of a clamp; up to 1e-6 or absent: plain SwiGlu
  std::optional<double> shared_limit;         ///< L of the shared experts' clamp
  std::optional<double> alpha;                ///< SwiGluOai
  std::optional<double> beta;                 ///< SiTu b
  std::optional<double> linear_beta;          ///< SiTu lb
  std::int64_t shared_intermediate_size = 0;  ///< 0: no shared experts
  std::optional<bool> averaged;

  std::int64_t latent_size = 0;
  bool latent_norm = false;
  double norm_eps = 1e-6;  ///< counts where the layer has an RMS norm
};

/// The configuration of a layer of `model` with the values of a file. Throws ConfigError where the
/// router contradicts itself.
MoeConfig make_config(const Model& model, LayerValues values);

}  // namespace moesaic
