/// The routed experts of a layer in a GGUF file: stacked or one tensor per expert.

#include <initializer_list>
#include <memory>
#include <utility>

#include "weights/gguf_roles.hpp"

namespace moesaic {
namespace {

using stack::check_shape;
using stack::per_expert_role;
using stack::shape_text;
using stack::Sources;
using stack::stacked_role;

[[noreturn]] void missing(std::int32_t layer, const std::string& what) {
  throw FormatError(Problem{.operation = "load_from_gguf",
                            .what = "layer " + std::to_string(layer),
                            .expected = what,
                            .got = "no such tensor",
                            .hint = "GgufFile.moe_layers lists the layers with experts"});
}

std::shared_ptr<const std::vector<float>> optional_values(
    const GgufFile& file, const GgufTensor* tensor, std::initializer_list<std::int64_t> shape) {
  if (tensor == nullptr) return nullptr;
  return std::make_shared<const std::vector<float>>(stack::decode_tensor(file, *tensor, shape));
}

/// Splits the bias of a fused tensor, [E, 2I], into its gate and up halves.
void split_fused_bias(const GgufFile& file, const GgufTensor& bias, ExpertStack::Parts& parts) {
  const std::int64_t half = parts.shape.intermediate_size;
  const std::vector<float> all =
      stack::decode_tensor(file, bias, {parts.shape.num_experts, 2 * half});
  std::vector<float> gate, up;
  for (auto at = all.begin(); at != all.end(); at += 2 * half) {
    gate.insert(gate.end(), at, at + half);
    up.insert(up.end(), at + half, at + 2 * half);
  }
  parts.gate.bias = std::make_shared<const std::vector<float>>(std::move(gate));
  parts.up.bias = std::make_shared<const std::vector<float>>(std::move(up));
}

/// Takes files with one tensor per role and expert, as early Mixtral files are.
Sources load_per_expert(const GgufFile& file, const MoeTensors& tensors, std::int32_t layer,
                        ExpertStack::Parts& parts) {
  const std::string prefix = "blk." + std::to_string(layer) + ".ffn_";
  const std::size_t experts = tensors.expert_down.size();
  const auto check = [&](const std::vector<const GgufTensor*>& role, const char* name) {
    for (std::size_t e = 0; e < experts; ++e) {
      if (e >= role.size() || role[e] == nullptr) {
        missing(layer, prefix + name + "." + std::to_string(e) + ".weight");
      }
    }
    require<FormatError>(role.size() == experts, [&] {
      return Problem{.operation = "load_from_gguf",
                     .what = prefix + name + ".*.weight",
                     .expected = std::to_string(experts) + " experts",
                     .got = std::to_string(role.size()),
                     .hint = {}};
    });
  };
  check(tensors.expert_up, "up");
  check(tensors.expert_down, "down");
  if (!tensors.expert_gate.empty()) check(tensors.expert_gate, "gate");
  const GgufTensor& first = *tensors.expert_up.front();
  require<FormatError>(first.rank == 2, [&] {
    return Problem{.operation = "load_from_gguf",
                   .what = first.name,
                   .expected = "[I, H]",
                   .got = "rank " + std::to_string(first.rank),
                   .hint = {}};
  });
  const std::int64_t intermediate = first.shape[0], hidden = first.shape[1];
  parts.shape = {static_cast<std::int32_t>(experts), hidden, intermediate};
  if (!tensors.expert_gate.empty()) {
    parts.gate = per_expert_role(file, tensors.expert_gate, intermediate, hidden);
  }
  parts.up = per_expert_role(file, tensors.expert_up, intermediate, hidden);
  parts.down = per_expert_role(file, tensors.expert_down, hidden, intermediate);
  return {prefix + "gate.*.weight", prefix + "up.*.weight", prefix + "down.*.weight"};
}

/// Takes stacked tensors, [E, rows, cols], with gate and up apart or fused (gate rows first).
Sources load_stacked(const GgufFile& file, const MoeTensors& tensors, std::int32_t layer,
                     ExpertStack::Parts& parts) {
  const std::string prefix = "blk." + std::to_string(layer) + ".ffn_";
  const bool fused = tensors.gate_up != nullptr;
  if (!fused && tensors.up == nullptr) missing(layer, prefix + "up_exps.weight");
  if (tensors.down == nullptr) missing(layer, prefix + "down_exps.weight");
  const GgufTensor& first = fused ? *tensors.gate_up : *tensors.up;
  require<FormatError>(
      first.rank == 3 && first.shape[0] <= INT32_MAX && (!fused || first.shape[1] % 2 == 0), [&] {
        return Problem{.operation = "load_from_gguf",
                       .what = first.name,
                       .expected = fused ? "[E, 2I, H]" : "[E, I, H]",
                       .got = shape_text({first.shape, static_cast<std::size_t>(first.rank)}),
                       .hint = {}};
      });
  const std::int64_t experts = first.shape[0], hidden = first.shape[2];
  const std::int64_t intermediate = fused ? first.shape[1] / 2 : first.shape[1];
  parts.shape = {static_cast<std::int32_t>(experts), hidden, intermediate};
  check_shape(*tensors.down, {experts, hidden, intermediate});
  if (tensors.gate != nullptr && !fused) {
    check_shape(*tensors.gate, {experts, intermediate, hidden});
  }

  const auto load = [&](const GgufTensor& tensor, std::int64_t first_row, std::int64_t rows) {
    return stacked_role(file, tensor, experts, tensor.shape[1], first_row, rows, tensor.shape[2]);
  };
  parts.down = load(*tensors.down, 0, hidden);
  if (fused) {
    parts.gate = load(*tensors.gate_up, 0, intermediate);
    // One tensor holds both, with the up rows behind the gate rows of each expert.
    parts.up = parts.gate;
    parts.up.ref.base += intermediate * parts.up.ref.row_stride;
    if (const GgufTensor* bias = file.tensor(prefix + "gate_up_exps.bias")) {
      split_fused_bias(file, *bias, parts);
    }
  } else {
    if (tensors.gate != nullptr) parts.gate = load(*tensors.gate, 0, intermediate);
    parts.up = load(*tensors.up, 0, intermediate);
  }
  return {fused                     ? first.name
          : tensors.gate != nullptr ? tensors.gate->name
                                    : std::string(),
          first.name, tensors.down->name};
}

/// Reads the biases [E, rows] and scales [E] of the roles that have them.
void load_epilogues(const GgufFile& file, const MoeTensors& tensors, ExpertStack::Parts& parts) {
  const auto [experts, hidden, intermediate] = parts.shape;
  const auto load = [&, e = static_cast<std::int64_t>(experts)](
                        RoleWeights& role, const GgufTensor* bias, const GgufTensor* scale) {
    if (!role.ref) return;
    if (bias != nullptr) role.bias = optional_values(file, bias, {e, role.ref.rows});
    role.scale = optional_values(file, scale, {e});
  };
  // A fused tensor has one scale, stored as that of "up".
  const bool fused = tensors.gate_up != nullptr;
  load(parts.gate, tensors.gate_bias,
       fused && tensors.gate_scale == nullptr ? tensors.up_scale : tensors.gate_scale);
  load(parts.up, tensors.up_bias, tensors.up_scale);
  load(parts.down, tensors.down_bias, tensors.down_scale);
}

}  // namespace

ExpertStack ExpertStack::load_from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                                        const LoadOptions& options) {
  const auto start = stack::Clock::now();
  const MoeTensors tensors = find_moe_tensors(*file, layer);
  Parts parts;
  const bool stacked =
      tensors.gate_up != nullptr || tensors.up != nullptr || tensors.down != nullptr;
  if (!stacked && tensors.expert_down.empty()) {
    missing(layer, "expert tensors (blk." + std::to_string(layer) + ".ffn_*_exps.weight)");
  }
  const Sources sources = stacked ? load_stacked(*file, tensors, layer, parts)
                                  : load_per_expert(*file, tensors, layer, parts);
  load_epilogues(*file, tensors, parts);
  stack::record_roles(*file, parts, sources, options);
  return stack::finish(std::move(parts), options, start);
}

ExpertStack ExpertStack::open_and_load(const std::filesystem::path& path, std::int32_t layer,
                                       const LoadOptions& options) {
  return load_from_gguf(GgufFile::open(path), layer, options);
}

}  // namespace moesaic
