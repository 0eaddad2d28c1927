/// What a GGUF file holds of a layer beside the routed experts, each as a stack of one expert:
/// shared experts, and the projections of latent ones.

#include <utility>

#include "weights/gguf_roles.hpp"

namespace moesaic::stack {

ExpertStack load_shared_experts(const GgufFile& file, const MoeTensors& tensors,
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
  const std::int64_t hidden = down.shape[0], intermediate = down.shape[1];
  ExpertStack::Parts parts;
  parts.shape = {1, hidden, intermediate};
  const bool fused = gate == nullptr && up.shape[0] == 2 * intermediate;
  if (fused) {
    check_shape(up, {2 * intermediate, hidden});
    parts.gate = stacked_role(file, up, 1, 2 * intermediate, 0, intermediate, hidden);
    parts.up = stacked_role(file, up, 1, 2 * intermediate, intermediate, intermediate, hidden);
  } else {
    if (gate != nullptr) parts.gate = single_role(file, *gate, intermediate, hidden);
    parts.up = single_role(file, up, intermediate, hidden);
  }
  parts.down = single_role(file, down, hidden, intermediate);
  record_roles(file, parts,
               {fused             ? up.name
                : gate != nullptr ? gate->name
                                  : std::string(),
                up.name, down.name},
               options);
  return finish(std::move(parts), options, start);
}

ExpertStack load_latent_projections(const GgufFile& file, const MoeTensors& tensors,
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
  const std::int64_t latent = down.shape[0], hidden = down.shape[1];
  ExpertStack::Parts parts;
  parts.shape = {1, hidden, latent};
  parts.up = single_role(file, down, latent, hidden);
  parts.down = single_role(file, up, hidden, latent);
  record_roles(file, parts, {std::string(), down.name, up.name}, options);
  return finish(std::move(parts), options, start);
}

}  // namespace moesaic::stack
