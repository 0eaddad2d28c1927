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

/// "swiglu", "swiglu_oai", ...
const char* name_of(ActivationKind kind) noexcept;

enum class SharedKind : std::uint8_t { None, Plain, SigmoidGated };

struct MoeConfig {
  std::string architecture;  ///< GGUF architecture string, or the caller's own
  std::int32_t layer = 0;
  std::int64_t hidden_size = 0;
  std::int64_t intermediate_size = 0;
  std::int32_t num_experts = 0;
  std::int32_t top_k = 0;
  Activation activation{};
  RouterConfig router{};
  SharedKind shared = SharedKind::None;
  std::int64_t shared_intermediate_size = 0;

  /// Reads metadata and tensor shapes of one layer. Errors: UnsupportedError naming an architecture
  /// that is not in the presets, FormatError for missing or contradictory keys, ShapeError for a
  /// layer without experts.
  static MoeConfig from_gguf(const GgufFile& file, std::int32_t layer);
};

/// Architecture strings with a preset, e.g. "qwen3moe".
std::vector<std::string> known_architectures();

}  // namespace moesaic
