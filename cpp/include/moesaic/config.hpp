#pragma once

/// Facts of one MoE layer of a model, read from a file's metadata and never inferred from
/// containers.

#include <cstdint>
#include <string>
#include <vector>

#include "moesaic/routing.hpp"

namespace moesaic {

class GgufFile;

/// Activation of an expert; g = gate row, u = up row.
enum class ActivationKind : std::uint8_t {
  SwiGlu,             ///< silu(g) * u
  SwiGluClampInput,   ///< silu(min(g, L)) * clamp(u, -L, L)
  SwiGluClampOutput,  ///< min(silu(g), L) * clamp(u, -L, L)
  SwiGluOai,          ///< g' = min(g, L), u' = clamp(u, -L, L): g' * sigmoid(alpha * g') * (u' + 1)
  GeGluTanh,          ///< gelu_tanh(g) * u
  ReGlu,              ///< relu(g) * u
  GeluTanh,           ///< gelu_tanh(u), no gate
  ReluSquared,        ///< relu(u)^2, no gate
  SiTu,               ///< b*tanh(g/b) * sigmoid(g) * lb*tanh(u/lb); lb = 0 means plain u
};

struct Activation {
  ActivationKind kind = ActivationKind::SwiGlu;
  float limit = 7.0F;        ///< L of the clamped forms
  float alpha = 1.702F;      ///< SwiGluOai
  float beta = 1.0F;         ///< SiTu b
  float linear_beta = 0.0F;  ///< SiTu lb
  bool gated() const {
    return kind != ActivationKind::GeluTanh && kind != ActivationKind::ReluSquared;
  }
};

/// The scalar definition every kernel is compared with. `g` is ignored by ungated kinds.
float activate(const Activation& activation, float g, float u);

enum class SharedKind : std::uint8_t { None, Plain, SigmoidGated };

/// What the router reads. Experts: what the experts read. Norm: x under an RMS norm of its own
/// (Gemma 4). Separate: a tensor of its own in each call (SmallThinker).
enum class RouterInput : std::uint8_t { Experts, Norm, Separate };

struct MoeConfig {
  std::string architecture;  ///< GGUF architecture string, or the caller's own
  std::int32_t layer = 0;
  std::int64_t hidden_size = 0;  ///< H of x and of the output
  std::int64_t intermediate_size = 0;
  std::int32_t num_experts = 0;  ///< with weights; router.num_experts also counts identity ones
  std::int32_t top_k = 0;
  Activation activation{};
  RouterConfig router{};
  SharedKind shared = SharedKind::None;
  std::int64_t shared_intermediate_size = 0;  ///< of all shared experts together
  Activation shared_activation{};             ///< of shared experts
  /// Width at which the experts run between a projection down and one up; 0: at H.
  std::int64_t latent_size = 0;
  bool latent_norm = false;  ///< an RMS norm before the projection up
  bool input_norm = false;   ///< x passes an RMS norm before the experts
  RouterInput router_input = RouterInput::Experts;
  float norm_eps = 1e-6F;       ///< of these RMS norms
  std::int64_t vocab_size = 0;  ///< rows of the table that routes by token id; 0: no table

  /// Reads metadata and tensor shapes of one layer. Errors: UnsupportedError naming an architecture
  /// that is not in the presets, or the part that it needs and this library lacks; FormatError for
  /// missing or contradictory keys; ShapeError for a layer without experts.
  static MoeConfig from_gguf(const GgufFile& file, std::int32_t layer);
};

/// Architecture strings whose layers open, e.g. "qwen3moe".
std::vector<std::string> known_architectures();

/// One row of the presets in words; "key" marks what a file's metadata decides.
struct ArchitectureFacts {
  std::string architecture;
  std::string source;       ///< where the facts were read
  std::string score;        ///< "softmax", "sigmoid, key", ...
  std::string selection;    ///< what top-k reads, with biases and groups
  std::string renormalize;  ///< "yes", "no" or "key"
  std::string scale;        ///< "key" or ""
  std::string activation;
  std::string shared;   ///< "", "plain" or "sigmoid_gated", with "optional"
  std::string notes;    ///< latent experts, router input, ...
  std::string missing;  ///< the part that keeps its layers from opening, or ""
};
/// Every architecture of the presets, in their order.
std::vector<ArchitectureFacts> architecture_table();

enum class LayerKind : std::uint8_t { None, Dense, Moe };
/// What the feed-forward part of each block is, by the tensors that the file holds: leading dense
/// and interleaved layers, blocks without any. As long as `block_count`, or up to the last block
/// with tensors.
std::vector<LayerKind> layer_kinds(const GgufFile& file);

}  // namespace moesaic
