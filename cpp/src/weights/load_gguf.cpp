/// The routed experts of a layer in a GGUF file: stacked or one tensor per expert.

#include <initializer_list>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "weights/gguf_roles.hpp"

namespace moesaic {
namespace {

using weights::check_shape;
using weights::check_weight_cache;
using weights::KeptExperts;
using weights::per_expert_role;
using weights::Sources;
using weights::stacked_role;

[[noreturn]] void missing(std::int32_t layer, const std::string& what) {
  throw FormatError(Problem{.operation = "load_from_gguf",
                            .what = "layer " + std::to_string(layer),
                            .expected = what,
                            .got = "no such tensor",
                            .hint = "GgufFile.moe_layers lists the layers with experts"});
}

std::shared_ptr<const std::vector<float>> optional_values(
    const BlockReader& block, const GgufTensor* tensor, std::initializer_list<std::int64_t> shape) {
  if (tensor == nullptr) return nullptr;
  return std::make_shared<const std::vector<float>>(weights::decode_tensor(block, *tensor, shape));
}

/// Splits the bias of a fused tensor, [E, 2I], into its gate and up halves.
void split_fused_bias(const BlockReader& block, const GgufTensor& bias, ExpertStack::Parts& parts) {
  const std::int64_t half = parts.shape.intermediate_size;
  const std::vector<float> all =
      weights::decode_tensor(block, bias, {parts.shape.num_experts, 2 * half});
  std::vector<float> gate, up;
  for (auto at = all.begin(); at != all.end(); at += 2 * half) {
    gate.insert(gate.end(), at, at + half);
    up.insert(up.end(), at + half, at + 2 * half);
  }
  parts.gate.bias = std::make_shared<const std::vector<float>>(std::move(gate));
  parts.up.bias = std::make_shared<const std::vector<float>>(std::move(up));
}

/// The experts that the caller asks for of `count`, or none where it wants all.
std::optional<KeptExperts> kept_of(const LoadOptions& options, std::int32_t count) {
  if (!options.experts) return std::nullopt;
  return weights::keep_experts("load_from_gguf", *options.experts, count);
}

/// Where the roles came from, and which experts of the file they have, unless all.
struct Loaded {
  Sources sources;
  std::optional<KeptExperts> kept;
};

/// Takes files with one tensor per role and expert, as early Mixtral files are.
Loaded load_per_expert(const BlockReader& block, const MoeTensors& tensors, std::int32_t layer,
                       const LoadOptions& options, ExpertStack::Parts& parts) {
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
  const std::int64_t intermediate = first.ne(1), hidden = first.ne(0);
  parts.shape = {static_cast<std::int32_t>(experts), hidden, intermediate};
  const std::optional<KeptExperts> kept = kept_of(options, parts.shape.num_experts);
  const auto load = [&](const std::vector<const GgufTensor*>& role, std::int64_t rows,
                        std::int64_t cols) {
    return per_expert_role(block, role, rows, cols, kept ? &*kept : nullptr);
  };
  if (!tensors.expert_gate.empty()) parts.gate = load(tensors.expert_gate, intermediate, hidden);
  parts.up = load(tensors.expert_up, intermediate, hidden);
  parts.down = load(tensors.expert_down, hidden, intermediate);
  return {{prefix + "gate.*.weight", prefix + "up.*.weight", prefix + "down.*.weight"}, kept};
}

/// Takes stacked tensors, [E, rows, cols], with gate and up apart or fused (gate rows first).
Loaded load_stacked(const BlockReader& block, const MoeTensors& tensors, std::int32_t layer,
                    const LoadOptions& options, ExpertStack::Parts& parts) {
  const std::string prefix = "blk." + std::to_string(layer) + ".ffn_";
  const bool fused = tensors.gate_up != nullptr;
  if (!fused && tensors.up == nullptr) missing(layer, prefix + "up_exps.weight");
  if (tensors.down == nullptr) missing(layer, prefix + "down_exps.weight");
  const GgufTensor& first = fused ? *tensors.gate_up : *tensors.up;
  require<FormatError>(
      first.ne(3) == 1 && first.ne(2) <= INT32_MAX && (!fused || first.ne(1) % 2 == 0), [&] {
        return Problem{.operation = "load_from_gguf",
                       .what = first.name,
                       .expected = fused ? "[E, 2I, H]" : "[E, I, H]",
                       .got = first.shape_text(),
                       .hint = {}};
      });
  const std::int64_t experts = first.ne(2), hidden = first.ne(0);
  const std::int64_t intermediate = fused ? first.ne(1) / 2 : first.ne(1);
  parts.shape = {static_cast<std::int32_t>(experts), hidden, intermediate};
  check_shape(*tensors.down, {experts, hidden, intermediate});
  if (tensors.gate != nullptr && !fused) {
    check_shape(*tensors.gate, {experts, intermediate, hidden});
  }

  const std::optional<KeptExperts> kept = kept_of(options, parts.shape.num_experts);
  const auto load = [&](const GgufTensor& tensor, std::int64_t first_row, std::int64_t rows) {
    return stacked_role(block, tensor, experts, tensor.ne(1), first_row, rows, tensor.ne(0),
                        kept ? &*kept : nullptr);
  };
  parts.down = load(*tensors.down, 0, hidden);
  if (fused && kept) {
    parts.gate = load(*tensors.gate_up, 0, intermediate);
    parts.up = load(*tensors.gate_up, intermediate, intermediate);
  } else if (fused) {
    parts.gate = load(*tensors.gate_up, 0, intermediate);
    // One tensor holds both, with the up rows behind the gate rows of each expert.
    parts.up = parts.gate;
    parts.up.ref.base += intermediate * parts.up.ref.row_stride;
    parts.up.origin = weights::origin_of(block, *tensors.gate_up, intermediate, intermediate);
  } else {
    if (tensors.gate != nullptr) parts.gate = load(*tensors.gate, 0, intermediate);
    parts.up = load(*tensors.up, 0, intermediate);
  }
  return {{fused                     ? first.name
           : tensors.gate != nullptr ? tensors.gate->name
                                     : std::string(),
           first.name, tensors.down->name},
          kept};
}

/// The scales of one tensor per expert, [E]; null without them.
std::shared_ptr<const std::vector<float>> gathered_scales(
    const BlockReader& block, const std::vector<const GgufTensor*>& tensors, std::int64_t experts) {
  if (tensors.empty()) return nullptr;
  require<FormatError>(std::cmp_equal(tensors.size(), experts), [&] {
    return Problem{.operation = "load_from_gguf",
                   .what = tensors.back()->name,
                   .expected = "one scale for each of " + std::to_string(experts) + " experts",
                   .got = std::to_string(tensors.size()),
                   .hint = {}};
  });
  std::vector<float> values;
  for (const GgufTensor* tensor : tensors) {
    values.push_back(weights::decode_tensor(block, *tensor, {1}).front());
  }
  return std::make_shared<const std::vector<float>>(std::move(values));
}

/// Reads the biases [E, rows] and scales [E] of the roles that have them. What is stored twice is
/// read once, and the other shows as unused.
void load_epilogues(const BlockReader& block, const MoeTensors& tensors,
                    ExpertStack::Parts& parts) {
  const auto [experts, hidden, intermediate] = parts.shape;
  const auto load = [&, e = static_cast<std::int64_t>(experts)](
                        RoleWeights& role, const GgufTensor* bias, const GgufTensor* scale) {
    if (!role.ref) return;
    if (bias != nullptr) role.bias = optional_values(block, bias, {e, role.ref.rows});
    role.scale = optional_values(block, scale, {e});
  };
  load(parts.down, tensors.down_bias, tensors.down_scale);
  if (tensors.gate_up == nullptr) {
    load(parts.gate, tensors.gate_bias, tensors.gate_scale);
    load(parts.up, tensors.up_bias, tensors.up_scale);
  } else {
    const bool one_bias = tensors.gate_up_bias != nullptr;
    if (one_bias) split_fused_bias(block, *tensors.gate_up_bias, parts);
    // A fused tensor has one scale; llama.cpp's files name it after "up".
    const GgufTensor* const up_scale =
        tensors.gate_up_scale != nullptr ? tensors.gate_up_scale : tensors.up_scale;
    const bool own_scale = tensors.gate_up_scale == nullptr && tensors.gate_scale != nullptr;
    load(parts.gate, one_bias ? nullptr : tensors.gate_bias,
         own_scale ? tensors.gate_scale : up_scale);
    load(parts.up, one_bias ? nullptr : tensors.up_bias, up_scale);
  }
  const auto gather = [&, e = static_cast<std::int64_t>(experts)](
                          RoleWeights& role, const std::vector<const GgufTensor*>& scales) {
    if (role.ref && role.scale == nullptr) role.scale = gathered_scales(block, scales, e);
  };
  gather(parts.gate, tensors.expert_gate_scale);
  gather(parts.up, tensors.expert_up_scale);
  gather(parts.down, tensors.expert_down_scale);
}

}  // namespace

ExpertStack ExpertStack::load_from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                                        const LoadOptions& options) {
  const auto start = weights::Clock::now();
  check_weight_cache("load_from_gguf", *file, options);
  const MoeTensors tensors = find_moe_tensors(*file, layer);
  const BlockReader block(*file, layer);
  Parts parts;
  const bool stacked =
      tensors.gate_up != nullptr || tensors.up != nullptr || tensors.down != nullptr;
  if (!stacked && tensors.expert_down.empty()) {
    missing(layer, "expert tensors (blk." + std::to_string(layer) + ".ffn_*_exps.weight)");
  }
  const auto [sources, kept] = stacked ? load_stacked(block, tensors, layer, options, parts)
                                       : load_per_expert(block, tensors, layer, options, parts);
  load_epilogues(block, tensors, parts);
  block.check_all_used("load_from_gguf", BlockReader::Scope::RoutedExperts);
  weights::record_roles(block, parts, sources, options);
  if (!kept) return weights::finish(std::move(parts), options, start);
  for (RoleWeights* role : {&parts.gate, &parts.up, &parts.down}) {
    role->bias = weights::values_of_kept(role->bias, role->ref.rows, *kept);
    role->scale = weights::values_of_kept(role->scale, 1, *kept);
  }
  return weights::finish_kept(std::move(parts), *kept, options, start);
}

ExpertStack ExpertStack::open_and_load(const std::filesystem::path& path, std::int32_t layer,
                                       const LoadOptions& options) {
  return load_from_gguf(GgufFile::open(path), layer, options);
}

}  // namespace moesaic
