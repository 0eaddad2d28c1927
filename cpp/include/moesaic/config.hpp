#pragma once

/// Facts of one MoE layer of a model. They come from the metadata of a file, because tensors cannot
/// tell how a router scores or what an activation does.

#include <cstdint>
#include <string>
#include <vector>

#include "moesaic/routing.hpp"

namespace moesaic {

class GgufFile;

/// The scalar definition every kernel is compared with. `g` is ignored by ungated kinds.
float activate(const Activation& activation, float g, float u);

/// Experts that every token passes. Their sum is added as it is, or times the sigmoid of a logit of
/// their own (Qwen).
enum class SharedKind : std::uint8_t { None, Plain, SigmoidGated };

/// What the router reads.
enum class RouterInput : std::uint8_t {
  Experts,   ///< what the experts read
  Norm,      ///< x under an RMS norm of its own (Gemma 4)
  Separate,  ///< a tensor of its own in each call (SmallThinker)
};

struct MoeConfig {
  std::string architecture;  ///< GGUF architecture string, or the caller's own
  std::int32_t layer = 0;
  std::int64_t hidden_size = 0;  ///< H of x and of the output
  std::int64_t intermediate_size = 0;
  std::int32_t num_experts =
      0;  ///< those with weights; router.num_experts counts identity ones too
  std::int32_t top_k = 0;
  Activation activation{};
  RouterConfig router{};
  SharedKind shared = SharedKind::None;
  std::int64_t shared_intermediate_size = 0;  ///< width of all shared experts together
  Activation shared_activation{};
  /// Factor of the shared experts' sum. A MoeLayer takes it up in the scale of their down matrix.
  float shared_scale = 1.0F;
  /// Width at which the experts run, between a projection down and one up; 0: they run at H.
  std::int64_t latent_size = 0;
  bool latent_norm = false;  ///< an RMS norm before the projection up
  bool input_norm = false;   ///< x passes an RMS norm before the experts
  RouterInput router_input = RouterInput::Experts;
  float norm_eps = 1e-6F;       ///< added under the root in these RMS norms
  std::int64_t vocab_size = 0;  ///< rows of the table that routes by token id; 0: no table

  /// Reads metadata and tensor shapes of one layer. An architecture may be spelled in any way that
  /// is published. Errors: UnsupportedError naming an architecture that is not in the presets, with
  /// those that resemble it, or the part that it needs and this library lacks; FormatError for
  /// missing or contradictory keys; ShapeError for a layer without experts.
  static MoeConfig from_gguf(const GgufFile& file, std::int32_t layer);
};

/// Architecture strings whose layers open, e.g. "qwen3moe".
std::vector<std::string> known_architectures();

/// One row of the presets in words; "key" marks what a file's metadata decides.
struct ArchitectureFacts {
  std::string architecture;
  std::string source;       ///< where the facts were read
  std::string model_types;  ///< transformers' names of the models stored so, with spaces between
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

/// What the feed-forward part of a block is.
enum class LayerKind : std::uint8_t { None, Dense, Moe };
/// The kind of each block by the tensors that the file holds, because keys announce neither every
/// leading dense layer nor every block without a feed-forward part. The list is as long as
/// `block_count`, or reaches to the last block with tensors. Throws FormatError for block numbers
/// beyond any model.
std::vector<LayerKind> layer_kinds(const GgufFile& file);

}  // namespace moesaic
