#include "moesaic/layer.hpp"

#include <utility>

#include "moesaic/gguf.hpp"
#include "stack/load.hpp"

namespace moesaic {
namespace {

template <class T>
void check_equal(const char* what, T expected, T got) {
  require<ShapeError>(expected == got, [&] {
    return Problem{.operation = "MoeLayer",
                   .what = what,
                   .expected = std::to_string(expected),
                   .got = std::to_string(got),
                   .hint = {}};
  });
}

void check_gate(const ExpertStack& stack, const Activation& activation, const char* what) {
  require<ShapeError>(stack.gated() == activation.gated(), [&] {
    return Problem{.operation = "MoeLayer",
                   .what = what,
                   .expected = std::string(activation.gated() ? "a" : "no") +
                               " gate tensor for activation " + name_of(activation.kind),
                   .got = stack.gated() ? "one" : "none",
                   .hint = {}};
  });
}

const GgufTensor& need(const GgufTensor* tensor, std::int32_t layer, const char* name) {
  require<FormatError>(tensor != nullptr, [&] {
    return Problem{.operation = "MoeLayer::from_gguf",
                   .what = "layer " + std::to_string(layer),
                   .expected = "blk." + std::to_string(layer) + "." + name,
                   .got = "no such tensor",
                   .hint = {}};
  });
  return *tensor;
}

}  // namespace

MoeLayer::MoeLayer(MoeConfig config, std::shared_ptr<const ExpertStack> stack,
                   std::vector<float> router_weight, std::optional<SharedExperts> shared)
    : config_(std::move(config)),
      stack_(std::move(stack)),
      router_weight_(std::move(router_weight)),
      shared_(std::move(shared)) {
  require<ShapeError>(stack_ != nullptr, [] {
    return Problem{.operation = "MoeLayer",
                   .what = "stack",
                   .expected = "an ExpertStack",
                   .got = "null",
                   .hint = {}};
  });
  check_equal("num_experts", config_.num_experts, stack_->num_experts());
  check_equal("hidden_size", config_.hidden_size, stack_->shape().hidden_size);
  check_equal("intermediate_size", config_.intermediate_size, stack_->shape().intermediate_size);
  check_equal("router.num_experts", config_.num_experts, config_.router.num_experts);
  check_equal("router.top_k", config_.top_k, config_.router.top_k);
  config_.router.validate();
  check_gate(*stack_, config_.activation, "stack");
  if (!router_weight_.empty()) {
    check_equal("router_weight elements", config_.num_experts * config_.hidden_size,
                static_cast<std::int64_t>(router_weight_.size()));
  }
  require<ShapeError>(shared_.has_value() == (config_.shared != SharedKind::None), [&] {
    return Problem{.operation = "MoeLayer",
                   .what = "shared experts",
                   .expected = shared_ ? "none, as the config says" : "the config's shared experts",
                   .got = shared_ ? "some" : "none",
                   .hint = {}};
  });
  if (!shared_) return;
  check_equal("shared.num_experts", 1, shared_->stack.num_experts());
  check_equal("shared.hidden_size", config_.hidden_size, shared_->stack.shape().hidden_size);
  check_equal("shared.intermediate_size", config_.shared_intermediate_size,
              shared_->stack.shape().intermediate_size);
  const bool sigmoid = config_.shared == SharedKind::SigmoidGated;
  check_equal("shared.gate elements", sigmoid ? config_.hidden_size : 0,
              static_cast<std::int64_t>(shared_->gate.size()));
  check_gate(shared_->stack, config_.activation, "shared");
}

MoeLayer MoeLayer::from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                             const LoadOptions& options) {
  MoeConfig config = MoeConfig::from_gguf(*file, layer);
  const MoeTensors tensors = find_moe_tensors(*file, layer);
  if (config.activation.gated() && tensors.gate_up == nullptr && tensors.expert_gate.empty()) {
    need(tensors.gate, layer, "ffn_gate_exps.weight");
  }
  auto stack =
      std::make_shared<const ExpertStack>(ExpertStack::load_from_gguf(file, layer, options));
  std::vector<float> router_weight =
      stack::decode_tensor(*file, need(tensors.router, layer, "ffn_gate_inp.weight"),
                           {config.num_experts, config.hidden_size});
  std::optional<SharedExperts> shared;
  if (config.shared != SharedKind::None) {
    shared.emplace(
        SharedExperts{stack::load_shared_experts(*file, tensors, options), std::vector<float>()});
    if (config.shared == SharedKind::SigmoidGated) {
      shared->gate = stack::decode_tensor(
          *file, need(tensors.shared_router, layer, "ffn_gate_inp_shexp.weight"),
          {config.hidden_size});
    }
  }
  return MoeLayer(std::move(config), std::move(stack), std::move(router_weight), std::move(shared));
}

}  // namespace moesaic
