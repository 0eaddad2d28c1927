#include <algorithm>
#include <charconv>
#include <map>
#include <set>
#include <string>

#include "moesaic/config.hpp"
#include "moesaic/error.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic {
namespace {

/// Bounds on what a file may make layer_kinds allocate.
constexpr std::int64_t kMaxBlocks = 1 << 20, kEmptyBlocks = 1 << 10;

/// Takes a decimal number without leading zeros, and the dot behind it, off the front of `text`.
std::optional<std::int32_t> take_number(std::string_view& text) {
  // from_chars would take a sign.
  if (text.empty() || text.front() < '0' || text.front() > '9') return std::nullopt;
  std::int32_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  const auto digits = static_cast<std::size_t>(end - text.data());
  if (error != std::errc{} || digits >= text.size() || *end != '.' ||
      (digits > 1 && text.front() == '0')) {
    return std::nullopt;
  }
  text.remove_prefix(digits + 1);
  return value;
}

/// "blk.3.ffn_up.weight" -> 3, and the text behind "blk.3.".
std::optional<std::int32_t> take_block(std::string_view& name) {
  constexpr std::string_view kPrefix = "blk.";
  if (!name.starts_with(kPrefix)) return std::nullopt;
  name.remove_prefix(kPrefix.size());
  return take_number(name);
}

/// The expert of "ffn_up.7.weight" for the role "ffn_up." and the part "weight".
std::optional<std::int32_t> expert_of(std::string_view rest, std::string_view role,
                                      std::string_view part = "weight") {
  if (!rest.starts_with(role)) return std::nullopt;
  rest.remove_prefix(role.size());
  const std::optional<std::int32_t> expert = take_number(rest);
  return rest == part ? expert : std::nullopt;
}

bool is_expert_tensor(std::string_view rest) {
  return rest == "ffn_gate_exps.weight" || rest == "ffn_up_exps.weight" ||
         rest == "ffn_gate_up_exps.weight" || rest == "ffn_down_exps.weight" ||
         expert_of(rest, "ffn_gate.") || expert_of(rest, "ffn_up.") || expert_of(rest, "ffn_down.");
}

/// One tensor per expert, in the order of the experts. FormatError when one is missing.
std::vector<const GgufTensor*> per_expert(const GgufFile& file, std::int32_t layer,
                                          std::string_view role, std::string_view part = "weight") {
  std::map<std::int32_t, const GgufTensor*> found;
  for (const GgufTensor& tensor : file.tensors()) {
    std::string_view rest = tensor.name;
    if (take_block(rest) != layer) continue;
    if (const auto expert = expert_of(rest, role, part)) found.emplace(*expert, &tensor);
  }
  std::vector<const GgufTensor*> tensors;
  for (const auto& [expert, tensor] : found) {
    require<FormatError>(static_cast<std::size_t>(expert) == tensors.size(), [&, e = expert] {
      return Problem{"find_moe_tensors",
                     file.path().string() + ": layer " + std::to_string(layer),
                     "tensor blk." + std::to_string(layer) + "." + std::string(role) +
                         std::to_string(tensors.size()) + "." + std::string(part),
                     "a gap before expert " + std::to_string(e),
                     {}};
    });
    tensors.push_back(tensor);
  }
  return tensors;
}

}  // namespace

std::vector<std::int32_t> GgufFile::moe_layers() const {
  std::set<std::int32_t> layers;
  for (const GgufTensor& tensor : tensors()) {
    std::string_view rest = tensor.name;
    const std::optional<std::int32_t> layer = take_block(rest);
    if (layer && is_expert_tensor(rest)) layers.insert(*layer);
  }
  return {layers.begin(), layers.end()};
}

std::vector<LayerKind> layer_kinds(const GgufFile& file) {
  std::map<std::int32_t, LayerKind> found;
  for (const GgufTensor& tensor : file.tensors()) {
    std::string_view rest = tensor.name;
    const std::optional<std::int32_t> layer = take_block(rest);
    if (!layer) continue;
    LayerKind& kind = found[*layer];
    if (is_expert_tensor(rest)) {
      kind = LayerKind::Moe;
    } else if (kind == LayerKind::None && (rest == "ffn_up.weight" || rest == "ffn_down.weight")) {
      kind = LayerKind::Dense;
    }
  }
  const std::string architecture = file.string("general.architecture").value_or("");
  const std::int64_t blocks = file.integer(architecture + ".block_count").value_or(0);
  const std::int64_t stored = found.empty() ? 0 : std::int64_t{found.rbegin()->first} + 1;
  // A count that the tensors do not bear out is not worth its memory.
  const std::int64_t count = std::max(std::min(blocks, stored + kEmptyBlocks), stored);
  require<FormatError>(stored <= kMaxBlocks, [&] {
    return Problem{"layer_kinds",
                   file.path().string(),
                   "at most " + std::to_string(kMaxBlocks) + " blocks",
                   "blk." + std::to_string(stored - 1),
                   {}};
  });
  std::vector<LayerKind> kinds(static_cast<std::size_t>(count), LayerKind::None);
  for (const auto& [layer, kind] : found) kinds[static_cast<std::size_t>(layer)] = kind;
  return kinds;
}

MoeTensors find_moe_tensors(const GgufFile& file, std::int32_t layer) {
  const std::string block = "blk." + std::to_string(layer) + ".";
  const auto find = [&](std::string_view rest) { return file.tensor(block + std::string(rest)); };

  MoeTensors tensors;
  tensors.router = find("ffn_gate_inp.weight");
  tensors.router_bias = find("ffn_gate_inp.bias");
  tensors.selection_bias = find("exp_probs_b.bias");
  // Hunyuan V3 files have the name without a suffix.
  if (tensors.selection_bias == nullptr) tensors.selection_bias = find("exp_probs_b");
  tensors.router_scale = find("ffn_gate_inp.scale");
  tensors.token_experts = find("ffn_gate_tid2eid.weight");
  tensors.gate = find("ffn_gate_exps.weight");
  tensors.up = find("ffn_up_exps.weight");
  tensors.gate_up = find("ffn_gate_up_exps.weight");
  tensors.down = find("ffn_down_exps.weight");
  tensors.gate_bias = find("ffn_gate_exps.bias");
  tensors.up_bias = find("ffn_up_exps.bias");
  tensors.down_bias = find("ffn_down_exps.bias");
  tensors.gate_scale = find("ffn_gate_exps.scale");
  tensors.up_scale = find("ffn_up_exps.scale");
  tensors.down_scale = find("ffn_down_exps.scale");
  tensors.gate_up_bias = find("ffn_gate_up_exps.bias");
  tensors.gate_up_scale = find("ffn_gate_up_exps.scale");
  tensors.shared_gate = find("ffn_gate_shexp.weight");
  tensors.shared_up = find("ffn_up_shexp.weight");
  tensors.shared_down = find("ffn_down_shexp.weight");
  tensors.shared_gate_scale = find("ffn_gate_shexp.scale");
  tensors.shared_up_scale = find("ffn_up_shexp.scale");
  tensors.shared_down_scale = find("ffn_down_shexp.scale");
  tensors.shared_router = find("ffn_gate_inp_shexp.weight");
  // Nemotron-H and Kimi K3 name the same projections differently; Gemma 4 and Arctic the norm.
  const auto either = [&](std::string_view a, std::string_view b) {
    const GgufTensor* const first = find(a);
    return first != nullptr ? first : find(b);
  };
  tensors.latent_down = either("ffn_latent_down.weight", "ffn_routed_down.weight");
  tensors.latent_up = either("ffn_latent_up.weight", "ffn_routed_up.weight");
  tensors.latent_down_scale = either("ffn_latent_down.scale", "ffn_routed_down.scale");
  tensors.latent_up_scale = either("ffn_latent_up.scale", "ffn_routed_up.scale");
  tensors.latent_norm = find("ffn_routed_norm.weight");
  tensors.input_norm = either("pre_ffw_norm_2.weight", "ffn_norm_exps.weight");
  tensors.chunk_up = find("ffn_up_chexps.weight");
  if (tensors.down == nullptr) {
    tensors.expert_gate = per_expert(file, layer, "ffn_gate.");
    tensors.expert_up = per_expert(file, layer, "ffn_up.");
    tensors.expert_down = per_expert(file, layer, "ffn_down.");
    tensors.expert_gate_scale = per_expert(file, layer, "ffn_gate.", "scale");
    tensors.expert_up_scale = per_expert(file, layer, "ffn_up.", "scale");
    tensors.expert_down_scale = per_expert(file, layer, "ffn_down.", "scale");
  }
  return tensors;
}

}  // namespace moesaic
