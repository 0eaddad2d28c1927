#pragma once

/// A whole MoE layer: router, experts, shared experts, as the model defines them.

#include <memory>
#include <optional>
#include <vector>

#include "moesaic/config.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic {

/// Experts that see every token: a stack of one expert, optionally weighted by sigmoid(gate . x).
struct SharedExperts {
  ExpertStack stack;
  std::vector<float> gate;  ///< empty or [H]
};

class MoeLayer {
 public:
  /// `router_weight` is empty or f32 [E, H], dense. Errors: ShapeError when parts disagree with the
  /// config.
  MoeLayer(MoeConfig config, std::shared_ptr<const ExpertStack> stack,
           std::vector<float> router_weight = {}, std::optional<SharedExperts> shared = {});
  /// Everything from the file. Errors as MoeConfig::from_gguf and ExpertStack::load_from_gguf.
  static MoeLayer from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                            const LoadOptions& options = {});

  const MoeConfig& config() const { return config_; }
  const ExpertStack& stack() const { return *stack_; }
  const std::shared_ptr<const ExpertStack>& stack_ptr() const { return stack_; }
  const std::vector<float>& router_weight() const { return router_weight_; }
  const SharedExperts* shared() const { return shared_ ? &*shared_ : nullptr; }

 private:
  MoeConfig config_;
  std::shared_ptr<const ExpertStack> stack_;
  std::vector<float> router_weight_;
  std::optional<SharedExperts> shared_;
};

}  // namespace moesaic
