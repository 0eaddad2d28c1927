/// The rows of the presets in words, for tables that people read.

#include <algorithm>
#include <string>

#include "model/presets.hpp"

namespace moesaic {
namespace {

std::string name_of(ScoreFunction score) {
  switch (score) {
    case ScoreFunction::Softmax:
      return "softmax";
    case ScoreFunction::SoftmaxSelected:
      return "softmax of the selected";
    case ScoreFunction::Sigmoid:
      return "sigmoid";
    case ScoreFunction::SqrtSoftplus:
      return "sqrt(softplus)";
  }
  return "unknown";
}

/// A value that a key may or must give.
std::string or_key(const std::string& value, Use key) {
  switch (key) {
    case Use::Ignored:
      return value;
    case Use::Optional:
      return "key (" + value + ")";
    case Use::Required:
      break;
  }
  return "key";
}

std::string selection(const Preset& p) {
  std::string text = p.select_on == SelectOn::Logits ? "logits" : "scores";
  if (p.selection_bias != Use::Ignored) text += " + bias";
  if (p.selection_bias == Use::Optional) text += " if stored";
  return p.hash_layers ? text + "; first layers by token id" : text;
}

std::string shared(const Preset& p) {
  if (p.shared == SharedKind::None) return "";
  const std::string kind = p.shared == SharedKind::Plain ? "plain" : "sigmoid-gated";
  return p.shared_tensors == Use::Optional ? kind + " if stored" : kind;
}

std::string activation(const Preset& p) {
  const std::string kind = name_of(p.activation);
  return p.limit_key == Use::Optional ? kind + " if its key is set" : kind;
}

std::string notes(const Preset& p) {
  std::string text;
  const auto add = [&](bool there, std::string_view words) {
    if (there) text += (text.empty() ? "" : "; ") + std::string(words);
  };
  add(p.router_bias == Use::Required, "router bias");
  add(p.weight_on == WeightOn::Input, "weights on the input");
  add(!p.latent_key.empty(), "latent experts");
  add(p.router_input == RouterInput::Norm, "router norm");
  add(p.input_norm, "input norm");
  add(!p.notes.empty(), p.notes);
  return text;
}

}  // namespace

std::vector<std::string> known_architectures() {
  std::vector<std::string> names;
  for (const Preset& preset : presets()) {
    if (preset.missing.empty()) names.emplace_back(preset.architecture);
  }
  return names;
}

std::vector<ArchitectureFacts> architecture_table() {
  std::vector<ArchitectureFacts> rows;
  for (const Preset& p : presets()) {
    rows.push_back({.architecture = std::string(p.architecture),
                    .source = "llama.cpp src/models/" + std::string(p.source),
                    .score = or_key(name_of(p.score), p.score_key),
                    .selection = selection(p),
                    .renormalize = or_key(p.renormalize ? "yes" : "no", p.renormalize_key),
                    .scale = p.scale_key == Use::Ignored ? "" : "key",
                    .activation = activation(p),
                    .shared = shared(p),
                    .notes = notes(p),
                    .missing = std::string(p.missing)});
  }
  return rows;
}

}  // namespace moesaic
