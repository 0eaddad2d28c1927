#pragma once

/// A whole MoE layer: router, experts, shared experts, as the model defines them. What a block does
/// beside or after it (a parallel dense FFN, norms of the result) is the caller's.

#include <memory>
#include <optional>
#include <vector>

#include "moesaic/config.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic {

/// Experts that see every token: a stack of one expert, optionally weighted by sigmoid(gate . x).
/// Several shared experts are one whose width is the sum of theirs.
struct SharedExperts {
  ExpertStack stack;
  std::vector<float> gate{};  ///< empty or [H]
  Activation activation{};    ///< MoeLayer sets it from its config
  /// The part of MoeConfig::shared_scale that the scale of the down role holds already.
  float scale = 1.0F;
};

/// y = x / sqrt(mean(x^2) + eps) * weight. An empty weight means no norm.
struct RmsNorm {
  std::vector<float> weight;
  float eps = 1e-6F;
  explicit operator bool() const { return !weight.empty(); }
};

/// Experts of a narrower width L. The projections are the matrices of a stack of one ungated expert
/// with hidden size H and intermediate size L: its up role [L, H] leads to the experts, its down
/// role [H, L] back from their weighted sum.
struct LatentExperts {
  ExpertStack projections;
  RmsNorm norm{};  ///< of the weighted sum, empty or [L]
};

class ExpertResidency;

class MoeLayer {
 public:
  /// What a layer is made of; only the stack is always there.
  struct Parts {
    std::shared_ptr<const ExpertStack> stack;
    std::vector<float> router_weight{};  ///< empty or [E, H], E with the identity experts
    std::optional<SharedExperts> shared{};
    std::optional<LatentExperts> latent{};
    RmsNorm input_norm{};                       ///< of what the experts read, empty or [H]
    RmsNorm router_norm{};                      ///< of what the router reads, empty or [H]
    std::vector<std::int32_t> token_experts{};  ///< empty or [vocab_size, top_k]
    /// Runs the experts of a stack in slow memory (offload.hpp); null: they run from `stack`.
    std::shared_ptr<ExpertResidency> residency{};
  };

  /// Errors: ShapeError when parts disagree with the config, ConfigError for a contradictory
  /// config.
  MoeLayer(MoeConfig config, Parts parts);
  /// Everything from the file. Every tensor of the layer is used, or named in a FormatError.
  /// Errors as MoeConfig::from_gguf and ExpertStack::load_from_gguf.
  static MoeLayer from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                            const LoadOptions& options = {});
  /// The weights of the file under a config of the caller's, for architectures without a preset,
  /// for an edited config, for fewer experts per token. Biases of the router that the config leaves
  /// empty come from the file. A dense FFN beside the experts is the caller's. Errors: also
  /// ConfigError where the config has other biases than the file. With a stack: around experts that
  /// are loaded already.
  static MoeLayer from_gguf_with_config(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                                        MoeConfig config, const LoadOptions& options = {},
                                        std::shared_ptr<const ExpertStack> stack = nullptr,
                                        std::shared_ptr<ExpertResidency> residency = nullptr);
  /// A layer of the file around experts that are loaded already. Errors as MoeConfig::from_gguf.
  static MoeLayer from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                            const LoadOptions& options, std::shared_ptr<const ExpertStack> stack,
                            std::shared_ptr<ExpertResidency> residency);

  const MoeConfig& config() const { return config_; }
  const Parts& parts() const { return parts_; }
  const ExpertStack& stack() const { return *parts_.stack; }
  const std::shared_ptr<const ExpertStack>& stack_ptr() const { return parts_.stack; }
  const std::vector<float>& router_weight() const { return parts_.router_weight; }
  const SharedExperts* shared() const { return parts_.shared ? &*parts_.shared : nullptr; }
  const LatentExperts* latent() const { return parts_.latent ? &*parts_.latent : nullptr; }

 private:
  /// Device copies of router weights and biases, norms and token table, known by the address of
  /// this layer's: a copy of the layer has addresses of its own and starts without.
  struct Pins {
    std::vector<std::shared_ptr<const void>> handles;
    Pins() = default;
    Pins(const Pins&) {}
    Pins(Pins&&) = default;
    Pins& operator=(const Pins&) { return handles.clear(), *this; }
    Pins& operator=(Pins&&) = default;
  };
  MoeConfig config_;
  Parts parts_;
  Pins pins_;
};

}  // namespace moesaic
