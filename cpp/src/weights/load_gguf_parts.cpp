/// What a GGUF file holds of a layer beside the routed experts, each as a stack of one expert:
/// shared experts, and the projections of latent ones.

#include <memory>
#include <utility>
#include <vector>

#include "weights/gguf_roles.hpp"

namespace moesaic::weights {

ExpertStack load_shared_experts(const BlockReader& block, const MoeTensors& tensors, float factor,
                                const LoadOptions& options) {
  const auto start = Clock::now();
  require<FormatError>(tensors.shared_up != nullptr && tensors.shared_down != nullptr, [] {
    return Problem{.operation = "load_from_gguf",
                   .what = "shared experts",
                   .expected = "ffn_up_shexp.weight and ffn_down_shexp.weight",
                   .got = "only one of them",
                   .hint = {}};
  });
  const GgufTensor &up = *tensors.shared_up, &down = *tensors.shared_down;
  const GgufTensor* const gate = tensors.shared_gate;
  const std::int64_t hidden = down.ne(1), intermediate = down.ne(0);
  ExpertStack::Parts parts;
  parts.shape = {1, hidden, intermediate};
  const bool fused = gate == nullptr && up.ne(1) == 2 * intermediate;
  if (fused) {
    check_shape(up, {2 * intermediate, hidden});
    parts.gate = stacked_role(block, up, 1, 2 * intermediate, 0, intermediate, hidden);
    parts.up = stacked_role(block, up, 1, 2 * intermediate, intermediate, intermediate, hidden);
  } else {
    if (gate != nullptr) parts.gate = single_role(block, *gate, intermediate, hidden);
    parts.up = single_role(block, up, intermediate, hidden);
  }
  parts.down = single_role(block, down, hidden, intermediate);
  parts.up.scale = single_scale(block, tensors.shared_up_scale);
  if (fused) {
    parts.gate.scale = parts.up.scale;
  } else if (gate != nullptr) {
    parts.gate.scale = single_scale(block, tensors.shared_gate_scale);
  }
  parts.down.scale = single_scale(block, tensors.shared_down_scale, factor);
  record_roles(block, parts,
               {fused             ? up.name
                : gate != nullptr ? gate->name
                                  : std::string(),
                up.name, down.name},
               options);
  return finish(std::move(parts), options, start);
}

ExpertStack scale_result(const ExpertStack& stack, float factor) {
  require<UnsupportedError>(stack.device().type == DeviceType::Cpu, [&] {
    return Problem{.operation = "MoeLayer",
                   .what = "shared_scale",
                   .expected = "shared experts on the CPU",
                   .got = to_string(stack.device()),
                   .hint = "MoeLayer::from_gguf scales them before they reach a device"};
  });
  ExpertStack::Parts parts = parts_of(stack);
  const auto experts = static_cast<std::size_t>(stack.num_experts());
  std::vector<float> scale =
      parts.down.scale != nullptr ? *parts.down.scale : std::vector<float>(experts, 1.0F);
  for (float& value : scale) value *= factor;
  parts.down.scale = std::make_shared<const std::vector<float>>(std::move(scale));
  if (parts.down.bias != nullptr) {
    std::vector<float> bias = *parts.down.bias;
    for (float& value : bias) value *= factor;
    parts.down.bias = std::make_shared<const std::vector<float>>(std::move(bias));
  }
  if (parts.down.delta != nullptr) {
    LowRankDelta delta = *parts.down.delta;
    delta.scale *= factor;
    parts.down.delta = std::make_shared<const LowRankDelta>(std::move(delta));
  }
  return ExpertStack(std::move(parts));
}

ExpertStack load_latent_projections(const BlockReader& block, const MoeTensors& tensors,
                                    const LoadOptions& options) {
  const auto start = Clock::now();
  require<FormatError>(tensors.latent_down != nullptr && tensors.latent_up != nullptr, [] {
    return Problem{.operation = "load_from_gguf",
                   .what = "latent experts",
                   .expected = "projections down and up (ffn_latent_* or ffn_routed_*)",
                   .got = "only one of them",
                   .hint = {}};
  });
  const GgufTensor &down = *tensors.latent_down, &up = *tensors.latent_up;
  const std::int64_t latent = down.ne(1), hidden = down.ne(0);
  ExpertStack::Parts parts;
  parts.shape = {1, hidden, latent};
  parts.up = single_role(block, down, latent, hidden);
  parts.down = single_role(block, up, hidden, latent);
  parts.up.scale = single_scale(block, tensors.latent_down_scale);
  parts.down.scale = single_scale(block, tensors.latent_up_scale);
  record_roles(block, parts, {std::string(), down.name, up.name}, options);
  return finish(std::move(parts), options, start);
}

}  // namespace moesaic::weights
