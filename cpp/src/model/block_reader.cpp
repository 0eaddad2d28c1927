#include "model/block_reader.hpp"

#include <algorithm>
#include <array>

#include "moesaic/error.hpp"

namespace moesaic {
namespace {

constexpr auto kRoles =
    std::to_array<std::string_view>({"ffn_gate", "ffn_up", "ffn_down", "ffn_gate_up"});

/// The part of a name before the first dot.
std::string_view stem(std::string_view name) { return name.substr(0, name.find('.')); }

/// What no formula of a layer needs. `input_scale` quantises activations for engines that multiply
/// NVFP4 and FP8 by themselves; the weights do not change with it.
bool is_harmless(std::string_view name) { return name.ends_with(".input_scale"); }

/// Parts of a block beside its feed-forward network, by the beginning of their names in llama.cpp's
/// table.
constexpr auto kOtherParts = std::to_array<std::string_view>(
    {"attn", "ssm", "nextn", "indexer", "hc_", "shortconv", "time_mix", "channel_mix", "altup",
     "laurel", "vis_", "cross_attn", "inp_gate", "per_layer", "layer_out", "post_attention",
     "ffn_res"});
/// Norms between the parts of a block: before x reaches the layer, or after its result.
constexpr auto kNorms =
    std::to_array<std::string_view>({"ffn_norm", "ffn_sub_norm", "ffn_post_norm", "ffn_pre_norm",
                                     "post_ffw_norm", "pre_ffw_norm", "post_norm"});
/// What names of MoE tensors have in them, in llama.cpp and in checkpoints. Other unknown names are
/// taken for parts of the attention, of which new ones appear with every model.
constexpr auto kWords = std::to_array<std::string_view>(
    {"ffn", "ffw", "exp", "moe", "rout", "mlp", "score", "latent", "tid2eid"});

bool is_of_layer(std::string_view name, std::string_view others) {
  const std::string_view first = stem(name);
  const auto begins = [&](std::string_view part) { return first.starts_with(part); };
  if (std::ranges::any_of(kOtherParts, begins)) return false;
  if (std::ranges::find(kNorms, first) != kNorms.end() || has_word(others, first)) return false;
  return first.starts_with("gate") || std::ranges::any_of(kWords, [&](std::string_view word) {
           return name.find(word) != std::string_view::npos;
         });
}

}  // namespace

bool has_word(std::string_view words, std::string_view word) {
  while (!words.empty()) {
    const std::size_t end = std::min(words.find(' '), words.size());
    if (words.substr(0, end) == word) return true;
    words.remove_prefix(std::min(end + 1, words.size()));
  }
  return false;
}

bool is_routed_expert(std::string_view name) {
  const std::string_view first = stem(name);
  const bool numbered = name.size() > first.size() + 1 && name[first.size() + 1] >= '0' &&
                        name[first.size() + 1] <= '9';
  return std::ranges::any_of(kRoles, [&](std::string_view role) {
    return first.starts_with(role) &&
           (first.substr(role.size()) == "_exps" || (first == role && numbered));
  });
}

void BlockReader::check_all_used(const char* operation, Scope scope,
                                 std::string_view others) const {
  const std::string prefix = "blk." + std::to_string(layer_) + ".";
  for (const GgufTensor& tensor : file_.tensors()) {
    if (!tensor.name.starts_with(prefix) || used_.contains(&tensor)) continue;
    const std::string_view name = std::string_view(tensor.name).substr(prefix.size());
    const bool routed = is_routed_expert(name);
    const bool in_scope =
        scope == Scope::RoutedExperts ? routed : !routed && is_of_layer(name, others);
    require<FormatError>(!in_scope || is_harmless(name), [&] {
      return Problem{operation, tensor.name, "a tensor that this layer uses",
                     "one that would be left out of its numbers", file_.path().string()};
    });
  }
}

}  // namespace moesaic
