/// The rows of the presets in words, for tables that people read.

#include <algorithm>
#include <string>

#include "model/presets.hpp"

namespace moesaic {
namespace {

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

std::string selection(const Preset& p, const Model& m) {
  std::string text = name_of(m.select_on);
  const auto bias = [&](Use use) {
    if (use != Use::Ignored) text += " + bias";
    if (use == Use::Optional) text += " if stored";
  };
  bias(p.bias_use(m));
  if (m.group_reduce == GroupReduce::Max) text += "; groups by their best";
  return p.hash_layers ? text + "; first layers by token id" : text;
}

std::string shared(const Preset& p, const Model& m) {
  if (p.shared_tensors == Use::Ignored) return "";
  const std::string kind = name_of(m.shared);
  return p.shared_tensors == Use::Optional ? kind + " if stored" : kind;
}

std::string activation(const Preset& p, const Model& m) {
  const std::string kind = name_of(m.activation);
  if (p.limit_key != Use::Optional) return kind;
  if (p.absent_limit == 0.0) return kind + " if its key is set";
  return kind + ", limit: key (" + std::to_string(static_cast<int>(p.absent_limit)) + ")";
}

std::string notes(const Preset& p, const Model& m) {
  std::string text;
  const auto add = [&](bool there, std::string_view words) {
    if (there) text += (text.empty() ? "" : "; ") + std::string(words);
  };
  add(m.router_bias == Use::Required, "router bias");
  add(m.weight_on == WeightOn::Input, "weights on the input");
  add(!p.latent_key.empty(), "latent experts");
  add(m.router_input == RouterInput::Norm, "router norm");
  add(m.input_norm, "input norm");
  add(p.sigmoid_model != nullptr,
      p.sigmoid_model == nullptr
          ? ""
          : "as " + std::string(p.sigmoid_model->name) + " where the score is sigmoid");
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
    const Model& m = *p.model;
    const bool renormalize =
        p.renormalize_key == Use::Ignored ? m.renormalize : p.absent_renormalize;
    rows.push_back({.architecture = std::string(p.architecture),
                    .source = "llama.cpp src/models/" + std::string(p.source),
                    .model_types = std::string(p.model_types),
                    .score = or_key(name_of(m.score), p.score_key),
                    .selection = selection(p, m),
                    .renormalize = or_key(renormalize ? "yes" : "no", p.renormalize_key),
                    .scale = p.scale_key == Use::Ignored ? "" : "key",
                    .activation = activation(p, m),
                    .shared = shared(p, m),
                    .notes = notes(p, m),
                    .missing = std::string(p.missing)});
  }
  return rows;
}

}  // namespace moesaic
