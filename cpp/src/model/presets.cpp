#include "model/presets.hpp"

#include <algorithm>
#include <iterator>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "model/model_table.hpp"

namespace moesaic {
namespace {

using enum Use;

// What many rows share. A row starts from one of them and changes what differs.

/// No key says anything about the router.
constexpr Preset kNoKeys{};

/// DeepSeek-like: everything about the router stands in keys.
constexpr Preset kKeys{.score_key = Optional,
                       .renormalize_key = Optional,
                       .scale_key = Optional,
                       .shared_tensors = Optional,
                       .shared_width = SharedWidth::Count};

using Change = void (*)(Preset&);

constexpr void no_change(Preset&) {}

/// `base` under a name, with changes.
constexpr Preset row(std::string_view architecture, std::string_view source,
                     std::string_view model_types, const Model* model, Preset base,
                     Change change = no_change) {
  base.architecture = architecture;
  base.source = source;
  base.model_types = model_types;
  base.model = model;
  change(base);
  return base;
}

constexpr void shared_optional(Preset& p) { p.shared_tensors = Optional; }
constexpr void shared_of_key(Preset& p) {
  p.shared_tensors = Optional;
  p.shared_width = SharedWidth::Key;
}
constexpr void width_over_top_k(Preset& p) { p.width = WidthFallback::FeedForwardOverTopK; }
constexpr void qwen_gated(Preset& p) {
  p.width = WidthFallback::FeedForwardOverTopK;
  p.shared_tensors = Required;
  p.shared_width = SharedWidth::Key;
}
constexpr void required_score(Preset& p) { p.score_key = Required; }
constexpr void required_score_optional_bias(Preset& p) {
  p.score_key = Required;
  p.selection_bias = Optional;
}
constexpr void optional_bias(Preset& p) { p.selection_bias = Optional; }

/// A dense FFN beside the experts.
constexpr std::string_view kDense = "ffn_gate ffn_up ffn_down";

constexpr Preset kPresets[] = {
    row("afmoe", "afmoe.cpp", "afmoe", model_of("deepseek_v3"), kKeys),
    row("arctic", "arctic.cpp", "", model_of("arctic"), kNoKeys,
        [](Preset& p) {
          p.others = kDense;
          p.notes = "x: the layer input; the dense FFN is the caller's";
        }),
    row("bailingmoe", "bailingmoe.cpp", "", model_of("bailing_moe"), kKeys,
        [](Preset& p) { p.score_key = Ignored; }),
    row("bailingmoe2", "bailingmoe2.cpp", "", model_of("bailing_moe_v2"), kKeys,
        [](Preset& p) {
          required_score_optional_bias(p);
          p.shared_width = SharedWidth::KeyTimesCount;
        }),
    row("bailingmoe3", "bailingmoe3.cpp", "", model_of("bailing_moe_v3"), kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.limit_key = Optional;
          p.shared_width = SharedWidth::Key;
        }),
    row("cohere2moe", "cohere2moe.cpp", "cohere2_moe", model_of("cohere2_moe"), kKeys,
        [](Preset& p) {
          p.shared_width = SharedWidth::Tensors;
          p.notes = "x: the block's input norm; the mean of routed and shared experts";
        }),
    row("dbrx", "dbrx.cpp", "dbrx", model_of("dbrx"), kNoKeys),
    row("deepseek", "deepseek.cpp", "", model_of("deepseek"), kNoKeys,
        [](Preset& p) {
          p.scale_key = Optional;
          shared_optional(p);
          p.shared_width = SharedWidth::Count;
        }),
    row("deepseek2", "deepseek2.cpp", "deepseek_v2 deepseek_v3 kimi_k2 glm4_moe_lite",
        model_of("deepseek_v2"), kKeys,
        [](Preset& p) {
          p.sigmoid_model = model_of("deepseek_v3");
          p.sigmoid_if_flash = true;
          optional_bias(p);
        }),
    row("deepseek2-ocr", "deepseek2ocr.cpp", "", model_of("deepseek_v2"), kKeys,
        [](Preset& p) {
          p.sigmoid_model = model_of("deepseek_v3");
          optional_bias(p);
        }),
    row("deepseek32", "deepseek32.cpp", "deepseek_v32", model_of("deepseek_v3"), kKeys,
        required_score_optional_bias),
    row("deepseek4", "deepseek4.cpp", "deepseek_v4", model_of("deepseek_v4"), kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.renormalize_key = Required;
          p.scale_key = Required;
          p.hash_layers = true;
          p.limit_key = Optional;
          p.absent_limit = 10.0;  // transformers' default; llama.cpp refuses a file without the key
          p.routed_limit_for_shared = true;
          p.others = "exp_probs_b_vl";
          p.notes = "selection bias of text tokens";
        }),
    row("dflash", "dflash.cpp", "", model_of("dflash"), kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.renormalize_key = Required;
          p.scale_key = Required;
          p.limit_key = Required;
          p.routed_limit_for_shared = true;
          p.others = "exp_probs_b_vl";
        }),
    row("dots1", "dots1.cpp", "dots1", model_of("deepseek_v3"), kKeys,
        required_score_optional_bias),
    row("dots3note", "dots3note.cpp", "dots3_note", model_of("deepseek_v3"), kKeys, required_score),
    row("ernie4_5-moe", "ernie4-5-moe.cpp", "ernie4_5_moe", model_of("ernie4_5_moe"), kNoKeys,
        [](Preset& p) {
          optional_bias(p);
          shared_optional(p);
        }),
    row("exaone-moe", "exaone-moe.cpp", "exaone_moe", model_of("deepseek_v3"), kKeys,
        required_score_optional_bias),
    row("gemma4", "gemma4.cpp", "gemma4", model_of("gemma4"), kNoKeys,
        [](Preset& p) {
          p.others = "ffn_gate ffn_up ffn_down post_ffw_norm_1 post_ffw_norm_2";
          p.notes = "x: the residual stream; dense MLP and norms of the result are the caller's";
        }),
    row("glm-dsa", "glm-dsa.cpp", "glm_moe_dsa", model_of("deepseek_v3"), kKeys, optional_bias),
    row("glm4moe", "glm4-moe.cpp", "glm4_moe glm4v_moe solar_open", model_of("deepseek_v3"), kKeys,
        width_over_top_k),
    row("glm5-next", "glm5-next.cpp", "glm5_next", model_of("glm5_next"), kKeys,
        [](Preset& p) {
          p.limit_key = Optional;
          p.routed_limit_for_shared = true;
        }),
    row("gpt-oss", "openai-moe.cpp", "gpt_oss", model_of("gpt_oss"), kNoKeys),
    row("granite", "granite.cpp", "", model_of("granitemoe"), kNoKeys, shared_of_key),
    row("granite_swa", "granite-swa.cpp", "granitemoe_swa", model_of("granitemoe"), kNoKeys,
        shared_of_key),
    row("granitehybrid", "granite-hybrid.cpp", "granitemoehybrid", model_of("granitemoe"), kNoKeys,
        shared_of_key),
    row("granitemoe", "granite.cpp", "granitemoe granitemoeshared", model_of("granitemoe"), kNoKeys,
        shared_of_key),
    row("grok", "grok.cpp", "", model_of("grok"), kNoKeys,
        [](Preset& p) {
          p.others = kDense;
          p.notes = "a parallel dense FFN is the caller's";
        }),
    row("grovemoe", "grovemoe.cpp", "grovemoe", model_of("grovemoe"), kNoKeys,
        [](Preset& p) { p.missing = "chunk experts (ffn_*_chexps)"; }),
    row("hunyuan-moe", "hunyuan-moe.cpp", "hunyuan_v1_moe", model_of("hunyuan_v1_moe"), kNoKeys,
        shared_of_key),
    row("hy_v3", "hy-v3.cpp", "hy_v3", model_of("deepseek_v3"), kKeys,
        [](Preset& p) {
          optional_bias(p);
          p.width = WidthFallback::FeedForwardOverTopK;
          p.shared_width = SharedWidth::Tensors;
        }),
    row("hy_v4", "hy-v4.cpp", "hy_v4", model_of("hy_v4"), kKeys,
        [](Preset& p) {
          required_score_optional_bias(p);
          p.limit_key = Optional;
          p.shared_width = SharedWidth::Tensors;
        }),
    row("jamba", "jamba.cpp", "jamba", model_of("olmoe"), kNoKeys),
    row("kimi-k3", "kimi-k3.cpp", "", model_of("kimi_k3"), kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.latent_key = "expert_latent_length";
        }),
    row("kimi-linear", "kimi-linear.cpp", "kimi_linear", model_of("deepseek_v3"), kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.renormalize_key = Ignored;
        }),
    row("laguna", "laguna.cpp", "laguna", model_of("laguna"), kKeys,
        [](Preset& p) {
          p.renormalize_key = Required;
          p.scale_key = Required;
          p.shared_width = SharedWidth::Key;
        }),
    row("lfm2moe", "lfm2.cpp", "lfm2_moe", model_of("lfm2_moe"), kNoKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.scale_key = Optional;  // transformers' module has it; llama.cpp's graph does not ask
          p.selection_bias = Required;
        }),
    row("llada-moe", "llada-moe.cpp", "", model_of("olmoe"), kNoKeys, width_over_top_k),
    row("llama", "llama.cpp", "mixtral", model_of("mixtral"), kNoKeys, shared_optional),
    row("llama4", "llama4.cpp", "llama4", model_of("llama4"), kNoKeys, shared_optional),
    row("maple", "maple.cpp", "", model_of("maple"), kNoKeys,
        [](Preset& p) {
          p.limit_key = Optional;
          p.absent_limit = 7.0;
        }),
    row("mellum", "mellum.cpp", "mellum", model_of("qwen3_moe"), kNoKeys,
        [](Preset& p) {
          p.score_key = Optional;
          p.renormalize_key = Optional;
          p.absent_renormalize = true;
          p.width = WidthFallback::FeedForwardOverTopK;
        }),
    row("mimo2", "mimo2.cpp", "mimo_v2_flash", model_of("mimo_v2_flash"), kNoKeys,
        [](Preset& p) {
          optional_bias(p);
          p.scale_key = Optional;
        }),
    row("minicpm", "minicpm.cpp", "", model_of("mixtral"), kNoKeys, shared_optional),
    row("minimax-01", "minimax-01.cpp", "minimax", model_of("qwen3_moe"), kNoKeys),
    row("minimax-m2", "minimax-m2.cpp", "minimax_m2", model_of("minimax_m2"), kNoKeys,
        required_score),
    row("minimax-m3", "minimax-m3.cpp", "minimax_m3_vl", model_of("minimax_m3_vl"), kKeys,
        required_score),
    row("mistral3", "mistral3.cpp", "", model_of("mixtral"), kNoKeys, shared_optional),
    row("mistral4", "deepseek2.cpp", "mistral4", model_of("mistral4"), kKeys, optional_bias),
    row("nemotron_h_moe", "nemotron-h.cpp", "nemotron_h", model_of("nemotron_h"), kKeys,
        [](Preset& p) {
          p.score_key = Ignored;
          p.width = WidthFallback::FeedForwardOverTopK;
          p.shared_width = SharedWidth::Tensors;
          p.latent_key = "moe_latent_size";
        }),
    row("nomic-bert-moe", "bert.cpp", "", model_of("nomic_bert_moe"), kNoKeys),
    row("olmoe", "olmoe.cpp", "olmoe", model_of("olmoe"), kNoKeys),
    row("phimoe", "phi3.cpp", "phimoe", model_of("phimoe"), kNoKeys,
        [](Preset& p) { p.notes = "as llama.cpp: plain softmax, not the model's SparseMixer"; }),
    row("qwen2moe", "qwen2moe.cpp", "qwen2_moe", model_of("qwen2_moe"), kNoKeys, qwen_gated),
    row("qwen35moe", "qwen35moe.cpp", "qwen3_5_moe", model_of("qwen3_next"), kNoKeys, qwen_gated),
    row("qwen3moe", "qwen3moe.cpp", "qwen3_moe", model_of("qwen3_moe"), kNoKeys, width_over_top_k),
    row("qwen3next", "qwen3next.cpp", "qwen3_next", model_of("qwen3_next"), kNoKeys, qwen_gated),
    row("qwen3vlmoe", "qwen3vl-moe.cpp", "qwen3_vl_moe", model_of("qwen3_moe"), kNoKeys,
        width_over_top_k),
    row("qwen4exp", "qwen4exp.cpp", "qwen4_exp", model_of("qwen3_next"), kNoKeys, qwen_gated),
    row("refact", "refact.cpp", "", model_of("mixtral"), kNoKeys, shared_optional),
    row("rnd1", "rnd1.cpp", "", model_of("qwen3_moe"), kNoKeys, width_over_top_k),
    row("smallthinker", "smallthinker.cpp", "", model_of("smallthinker"), kNoKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.width = WidthFallback::FeedForwardOverTopK;
          p.notes = "router_input: the layer input before the attention norm";
        }),
    row("step35", "step35.cpp", "", model_of("step35"), kKeys,
        [](Preset& p) {
          optional_bias(p);
          p.limit_key = Optional;
          p.shared_width = SharedWidth::Key;
        }),
};

/// Spellings of published files, beside transformers' model types and what differs from a row by
/// case, '-', '_' and '.' alone.
struct Alias {
  std::string_view spelling, architecture;
};
constexpr Alias kAliases[] = {{"dflash-draft", "dflash"}};

/// Without what writers disagree about.
std::string folded(std::string_view name) {
  std::string text;
  for (const char c : name) {
    if (c == '-' || c == '_' || c == '.') continue;
    text += c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
  }
  return text;
}

/// How many characters must be put in, taken out or replaced to make `b` of `a`.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() + 1);
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = row[0]++;
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({row[j + 1] + 1, row[j] + 1, replaced});
    }
  }
  return row[b.size()];
}

}  // namespace

std::span<const Preset> presets() noexcept { return kPresets; }

const Preset* find_preset(std::string_view architecture) {
  const auto exact = std::ranges::find(kPresets, architecture, &Preset::architecture);
  if (exact != std::end(kPresets)) return &*exact;
  std::string name = folded(architecture);
  for (const Alias& alias : kAliases) {
    if (folded(alias.spelling) == name) name = folded(alias.architecture);
  }
  const auto spelled = std::ranges::find_if(
      kPresets, [&](const Preset& preset) { return folded(preset.architecture) == name; });
  if (spelled != std::end(kPresets)) return &*spelled;
  const auto typed = std::ranges::find_if(
      kPresets, [&](const Preset& preset) { return has_word(preset.model_types, architecture); });
  return typed == std::end(kPresets) ? nullptr : &*typed;
}

std::vector<std::string> near_architectures(std::string_view architecture) {
  constexpr std::size_t kMost = 3, kLongest = 64;
  const std::string name = folded(architecture.substr(0, kLongest));
  std::vector<std::pair<std::size_t, std::string>> near;
  for (const Preset& preset : kPresets) {
    const std::string other = folded(preset.architecture);
    std::size_t distance = edit_distance(name, other);
    // A name that goes on from a known one is a newer model of its makers.
    if (name.starts_with(other) && other.size() >= 4) distance = std::min<std::size_t>(distance, 2);
    if (3 * distance <= std::max(name.size(), other.size())) {
      near.emplace_back(distance, preset.architecture);
    }
  }
  std::ranges::sort(near);
  std::vector<std::string> names;
  for (const auto& [distance, known] : near) {
    if (names.size() < kMost) names.push_back(known);
  }
  return names;
}

}  // namespace moesaic
