#include "model/presets.hpp"

namespace moesaic {
namespace {

using enum Use;
using enum ScoreFunction;
using enum ActivationKind;

// Parts that many rows share. A row starts from one of them and changes what differs.

/// Nothing stands in keys: softmax over all, the weights of the selected renormalised.
constexpr Preset kSoftmax{};

/// DeepSeek-like: everything about the router stands in keys.
constexpr Preset kKeys{.score_key = Optional,
                       .renormalize = false,
                       .renormalize_key = Optional,
                       .scale_key = Optional,
                       .selection_bias = Optional,
                       .shared = SharedKind::Plain,
                       .shared_tensors = Optional,
                       .shared_width = SharedWidth::Count};

using Change = void (*)(Preset&);

/// `base` under a name, with changes.
constexpr Preset row(std::string_view architecture, std::string_view source, Preset base,
                     Change change = nullptr) {
  base.architecture = architecture;
  base.source = source;
  if (change != nullptr) change(base);
  return base;
}

constexpr void shared_plain(Preset& p) {
  p.shared = SharedKind::Plain;
  p.shared_tensors = Optional;
}
constexpr void shared_sigmoid(Preset& p) {
  p.shared = SharedKind::SigmoidGated;
  p.shared_tensors = Required;
  p.shared_width = SharedWidth::Key;
}
constexpr void shared_of_key(Preset& p) {
  shared_plain(p);
  p.shared_width = SharedWidth::Key;
}
constexpr void not_renormalized(Preset& p) { p.renormalize = false; }
constexpr void default_sigmoid(Preset& p) { p.score = Sigmoid; }
constexpr void required_score(Preset& p) { p.score_key = Required; }
constexpr void biased_sigmoid(Preset& p) {
  p.score = Sigmoid;
  p.selection_bias = Required;
}
constexpr void required_score_and_bias(Preset& p) {
  p.score_key = Required;
  p.selection_bias = Required;
}
// Score, renormalisation and activation of a family stand in no key unless the row says so;
// llama.cpp's graphs fix them.
constexpr Preset kPresets[] = {
    row("afmoe", "afmoe.cpp", kKeys, biased_sigmoid),
    row("arctic", "arctic.cpp", kSoftmax,
        [](Preset& p) {
          p.input_norm = true;
          p.notes = "x: the layer input; the dense FFN is the caller's";
        }),
    row("bailingmoe", "bailingmoe.cpp", kKeys,
        [](Preset& p) {
          p.score_key = Ignored;
          p.selection_bias = Ignored;
        }),
    row("bailingmoe2", "bailingmoe2.cpp", kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.shared_width = SharedWidth::KeyTimesCount;
        }),
    row("bailingmoe3", "bailingmoe3.cpp", kKeys,
        [](Preset& p) {
          required_score_and_bias(p);
          p.activation = SwiGluClampOutput;
          p.limit_key = Optional;
          p.shared_limit = SharedLimit::Key;
          p.shared_width = SharedWidth::KeyTimesCount;
        }),
    row("cohere2moe", "cohere2moe.cpp", kKeys,
        [](Preset& p) {
          p.score = Sigmoid;
          p.selection_bias = Ignored;
          p.shared_width = SharedWidth::Tensors;
          p.notes = "x: the block's input norm";
        }),
    row("dbrx", "dbrx.cpp", kSoftmax),
    row("deepseek", "deepseek.cpp", kSoftmax,
        [](Preset& p) {
          p.renormalize = false;
          p.scale_key = Optional;
          shared_plain(p);
          p.shared_width = SharedWidth::Count;
        }),
    row("deepseek2", "deepseek2.cpp", kKeys, [](Preset& p) { p.sigmoid_if_flash = true; }),
    row("deepseek2-ocr", "deepseek2ocr.cpp", kKeys),
    row("deepseek32", "deepseek32.cpp", kKeys, required_score),
    row("deepseek4", "deepseek4.cpp", kKeys,
        [](Preset& p) {
          p.score = SqrtSoftplus;
          p.score_key = Required;
          p.renormalize_key = Required;
          p.scale_key = Required;
          p.selection_bias = Required;
          p.hash_layers = true;
          p.activation = SwiGluClampInput;
          p.limit_key = Optional;
          p.shared_limit = SharedLimit::KeyElseRouted;
          p.notes = "selection bias of text tokens";
        }),
    row("dflash", "dflash.cpp", kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.renormalize_key = Required;
          p.scale_key = Required;
          p.selection_bias = Required;
          p.activation = SwiGluClampInput;
          p.limit_key = Optional;
          p.shared_limit = SharedLimit::KeyElseRouted;
        }),
    row("dots1", "dots1.cpp", kKeys, required_score),
    row("dots3note", "dots3note.cpp", kKeys, required_score_and_bias),
    row("ernie4_5-moe", "ernie4-5-moe.cpp", kSoftmax,
        [](Preset& p) {
          p.selection_bias = Optional;
          shared_plain(p);
        }),
    row("exaone-moe", "exaone-moe.cpp", kKeys, required_score),
    row("gemma4", "gemma4.cpp", kSoftmax,
        [](Preset& p) {
          p.activation = GeGluTanh;
          p.input_norm = true;
          p.router_input = RouterInput::Norm;
          p.notes = "x: the residual stream; dense MLP and norms of the result are the caller's";
        }),
    row("glm-dsa", "glm-dsa.cpp", kKeys, default_sigmoid),
    row("glm4moe", "glm4-moe.cpp", kKeys, biased_sigmoid),
    row("glm5-next", "glm5-next.cpp", kKeys,
        [](Preset& p) {
          biased_sigmoid(p);
          p.activation = SwiGluClampInput;
          p.limit_key = Optional;
          p.shared_limit = SharedLimit::Key;
        }),
    row("gpt-oss", "openai-moe.cpp", kSoftmax,
        [](Preset& p) {
          p.score = SoftmaxSelected;
          p.renormalize = false;
          p.router_bias = Required;
          p.activation = SwiGluOai;
        }),
    row("granite", "granite.cpp", kSoftmax, shared_of_key),
    row("granite_swa", "granite-swa.cpp", kSoftmax, shared_of_key),
    row("granitehybrid", "granite-hybrid.cpp", kSoftmax, shared_of_key),
    row("granitemoe", "granite.cpp", kSoftmax, shared_of_key),
    row("grok", "grok.cpp", kSoftmax,
        [](Preset& p) {
          p.activation = GeGluTanh;
          p.notes = "a parallel dense FFN is the caller's";
        }),
    row("grovemoe", "grovemoe.cpp", kSoftmax,
        [](Preset& p) {
          p.select_on = SelectOn::Logits;
          p.missing = "chunk experts (ffn_*_chexps)";
        }),
    row("hunyuan-moe", "hunyuan-moe.cpp", kSoftmax, shared_of_key),
    row("hy_v3", "hy-v3.cpp", kKeys,
        [](Preset& p) {
          p.score = Sigmoid;
          p.shared_width = SharedWidth::Tensors;
        }),
    row("hy_v4", "hy-v4.cpp", kKeys,
        [](Preset& p) {
          p.score_key = Required;
          p.activation = SwiGluClampInput;
          p.limit_key = Optional;
          p.shared_width = SharedWidth::Tensors;
        }),
    row("jamba", "jamba.cpp", kSoftmax, not_renormalized),
    row("kimi-k3", "kimi-k3.cpp", kKeys,
        [](Preset& p) {
          required_score_and_bias(p);
          p.activation = SiTu;
          p.latent_key = "expert_latent_length";
        }),
    row("kimi-linear", "kimi-linear.cpp", kKeys,
        [](Preset& p) {
          required_score_and_bias(p);
          p.renormalize = true;
          p.renormalize_key = Ignored;
        }),
    row("laguna", "laguna.cpp", kKeys,
        [](Preset& p) {
          biased_sigmoid(p);
          p.shared_width = SharedWidth::Key;
        }),
    row("lfm2moe", "lfm2.cpp", kSoftmax, required_score_and_bias),
    row("llada-moe", "llada-moe.cpp", kSoftmax, not_renormalized),
    row("llama", "llama.cpp", kSoftmax, shared_plain),  // Mixtral
    row("llama4", "llama4.cpp", kSoftmax,
        [](Preset& p) {
          p.score = Sigmoid;
          p.select_on = SelectOn::Logits;
          p.renormalize = false;
          p.weight_on = WeightOn::Input;
          shared_plain(p);
        }),
    row("maple", "maple.cpp", kSoftmax,
        [](Preset& p) {
          p.activation = SwiGluClampInput;
          p.limit_key = Required;
        }),
    row("mellum", "mellum.cpp", kSoftmax),
    row("mimo2", "mimo2.cpp", kSoftmax,
        [](Preset& p) {
          p.score = Sigmoid;
          p.selection_bias = Optional;
        }),
    row("minicpm", "minicpm.cpp", kSoftmax, shared_plain),
    row("minimax-01", "minimax-01.cpp", kSoftmax),
    row("minimax-m2", "minimax-m2.cpp", kSoftmax, required_score_and_bias),
    row("minimax-m3", "minimax-m3.cpp", kKeys,
        [](Preset& p) {
          required_score_and_bias(p);
          p.activation = SwiGluOai;
        }),
    row("mistral3", "mistral3.cpp", kSoftmax, shared_plain),
    row("mistral4", "deepseek2.cpp", kKeys),
    row("nemotron_h_moe", "nemotron-h-moe.cpp", kKeys,
        [](Preset& p) {
          biased_sigmoid(p);
          p.score_key = Ignored;
          p.activation = ReluSquared;
          p.shared_width = SharedWidth::Tensors;
          p.latent_key = "moe_latent_size";
        }),
    row("nomic-bert-moe", "bert.cpp", kSoftmax,
        [](Preset& p) {
          p.renormalize = false;
          p.activation = GeluTanh;
        }),
    row("olmoe", "olmoe.cpp", kSoftmax, not_renormalized),
    row("phimoe", "phi3.cpp", kSoftmax,
        [](Preset& p) { p.notes = "as llama.cpp: plain softmax, not the model's SparseMixer"; }),
    row("qwen2moe", "qwen2moe.cpp", kSoftmax,
        [](Preset& p) {
          p.renormalize = false;
          p.width = WidthFallback::FeedForwardOverTopK;
          shared_sigmoid(p);
        }),
    row("qwen35moe", "qwen35moe.cpp", kSoftmax, shared_sigmoid),
    row("qwen3moe", "qwen3moe.cpp", kSoftmax),
    row("qwen3next", "qwen3next.cpp", kSoftmax, shared_sigmoid),
    row("qwen3vlmoe", "qwen3vl-moe.cpp", kSoftmax),
    row("qwen4exp", "qwen4exp.cpp", kSoftmax, shared_sigmoid),
    row("refact", "refact.cpp", kSoftmax, shared_plain),
    row("rnd1", "rnd1.cpp", kSoftmax),
    row("smallthinker", "smallthinker.cpp", kSoftmax,
        [](Preset& p) {
          p.score_key = Required;
          p.activation = ReGlu;
          p.router_input = RouterInput::Separate;
          p.notes = "router_input: the layer input before the attention norm";
        }),
    row("step35", "step35.cpp", kKeys,
        [](Preset& p) {
          p.score = Sigmoid;
          p.activation = SwiGluClampOutput;
          p.limit_key = Optional;
          p.shared_limit = SharedLimit::Key;
          p.shared_width = SharedWidth::Key;
        }),
};

}  // namespace

std::span<const Preset> presets() noexcept { return kPresets; }

}  // namespace moesaic
