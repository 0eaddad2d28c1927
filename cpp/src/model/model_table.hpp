#pragma once

/// The table of models. Rows of models that transformers defines follow its modules; the others
/// follow llama.cpp's graphs. Where both define a model, transformers decides: llama.cpp takes
/// liberties that its users do not see in most tokens (top-2 sums as the score of every kind of
/// group, max(sum, 6.1e-5) as every divisor).

#include "model/model.hpp"

namespace moesaic {

/// llama.cpp renormalises with max(sum, smallest normal f16).
inline constexpr float kLlamaCppFloor = 6.103515625e-5F;

namespace model_rows {

using enum ScoreFunction;
using enum ActivationKind;
using enum Use;

using Change = void (*)(Model&);

constexpr void no_change(Model&) {}

/// `base` under a name, with changes. A null pointer could not stand for none: GCC under its
/// sanitizers takes no comparison of a function with null for a constant.
constexpr Model row(std::string_view name, std::string_view source, Model base,
                    Change change = no_change) {
  base.name = name;
  base.source = source;
  change(base);
  return base;
}

// What many rows share. A row starts from one of them and changes what differs.

constexpr Model kSoftmax{};
constexpr Model kSoftmaxShared{.shared = SharedKind::Plain};
constexpr Model kSoftmaxGatedShared{.shared = SharedKind::SigmoidGated};
/// As kSoftmax in a model that llama.cpp alone defines.
constexpr Model kLlamaCpp{.guard = NormGuard::ClampMin, .guard_eps = kLlamaCppFloor};
constexpr Model kLlamaCppSigmoid{.score = Sigmoid,
                                 .guard = NormGuard::ClampMin,
                                 .guard_eps = kLlamaCppFloor,
                                 .selection_bias = Required,
                                 .shared = SharedKind::Plain};
/// DeepSeek-V3's router, which most models of today share.
constexpr Model kDeepSeekV3{.score = Sigmoid,
                            .guard = NormGuard::AddEps,
                            .guard_eps = 1e-20F,
                            .selection_bias = Required,
                            .shared = SharedKind::Plain};

inline constexpr Model kModels[] = {
    row("arctic", "llama.cpp arctic.cpp", kLlamaCpp, [](Model& m) { m.input_norm = true; }),
    row("bailing_moe", "llama.cpp bailingmoe.cpp", kLlamaCpp,
        [](Model& m) { m.shared = SharedKind::Plain; }),
    row("bailing_moe_v2", "llama.cpp bailingmoe2.cpp", kLlamaCppSigmoid),
    row("bailing_moe_v3", "llama.cpp bailingmoe3.cpp", kLlamaCppSigmoid,
        [](Model& m) { m.activation = SwiGluClampOutput; }),
    row("cohere2_moe", "transformers cohere2_moe", kSoftmaxShared,
        [](Model& m) {
          m.score = Sigmoid;
          m.select_on = SelectOn::Logits;
          m.averaged = true;
        }),
    row("dbrx", "llama.cpp dbrx.cpp", kLlamaCpp),
    row("deepseek", "llama.cpp deepseek.cpp", kLlamaCpp,
        [](Model& m) {
          m.renormalize = false;
          m.shared = SharedKind::Plain;
        }),
    row("deepseek_v2", "transformers deepseek_v2", kSoftmaxShared,
        [](Model& m) {
          m.renormalize = false;
          m.group_reduce = GroupReduce::Max;
          m.group_mask = GroupMask::Zero;
        }),
    row("deepseek_v3", "transformers deepseek_v3", kDeepSeekV3),
    row("deepseek_v4", "transformers deepseek_v4", kDeepSeekV3,
        [](Model& m) {
          m.score = SqrtSoftplus;
          m.activation = SwiGluClampInput;
        }),
    row("dflash", "llama.cpp dflash.cpp", kLlamaCppSigmoid,
        [](Model& m) {
          m.score = Softmax;
          m.activation = SwiGluClampInput;
        }),
    row("ernie4_5_moe", "transformers ernie4_5_moe", kSoftmaxShared,
        [](Model& m) {
          m.guard = NormGuard::ClampMin;
          m.guard_eps = 1e-12F;
          m.selection_bias = Required;
        }),
    row("gemma4", "transformers gemma4", kSoftmax,
        [](Model& m) {
          m.activation = GeGluTanh;
          m.input_norm = true;
          m.router_input = RouterInput::Norm;
        }),
    row("glm5_next", "transformers glm5_next", kDeepSeekV3,
        [](Model& m) { m.activation = SwiGluClampInput; }),
    row("gpt_oss", "transformers gpt_oss", kSoftmax,
        [](Model& m) {
          m.score = SoftmaxSelected;
          m.renormalize = false;
          m.router_bias = Required;
          m.activation = SwiGluOai;
        }),
    row("granitemoe", "transformers granitemoe", kSoftmaxShared,
        [](Model& m) {
          m.score = SoftmaxSelected;
          m.renormalize = false;
        }),
    row("grok", "llama.cpp grok.cpp", kLlamaCpp, [](Model& m) { m.activation = GeGluTanh; }),
    row("grovemoe", "llama.cpp grovemoe.cpp", kLlamaCpp,
        [](Model& m) { m.select_on = SelectOn::Logits; }),
    row("hunyuan_v1_moe", "transformers hunyuan_v1_moe", kSoftmaxShared),
    row("hy_v4", "transformers hy_v4", kDeepSeekV3,
        [](Model& m) {
          m.activation = SwiGluClampInput;
          m.shared_clamped = false;
        }),
    row("kimi_k3", "llama.cpp kimi-k3.cpp", kLlamaCppSigmoid,
        [](Model& m) { m.activation = SiTu; }),
    row("laguna", "transformers laguna", kDeepSeekV3,
        [](Model& m) {
          m.guard = NormGuard::None;
          m.guard_eps = 0.0F;
        }),
    row("lfm2_moe", "transformers lfm2_moe", kSoftmax,
        [](Model& m) {
          m.score = Sigmoid;
          m.guard = NormGuard::AddEps;
          m.guard_eps = 1e-6F;
          m.selection_bias = Optional;
        }),
    row("llama4", "transformers llama4", kSoftmaxShared,
        [](Model& m) {
          m.score = Sigmoid;
          m.select_on = SelectOn::Logits;
          m.renormalize = false;
          m.weight_on = WeightOn::Input;
        }),
    row("longcat_flash", "transformers longcat_flash", kSoftmax,
        [](Model& m) {
          m.renormalize = false;
          m.selection_bias = Required;
        }),
    row("maple", "llama.cpp maple.cpp", kLlamaCpp,
        [](Model& m) { m.activation = SwiGluClampInput; }),
    row("mimo_v2_flash", "transformers mimo_v2_flash", kDeepSeekV3,
        [](Model& m) { m.shared = SharedKind::None; }),
    row("minimax_m2", "transformers minimax_m2", kSoftmax,
        [](Model& m) {
          m.score = Sigmoid;
          m.selection_bias = Required;
        }),
    row("minimax_m3_vl", "transformers minimax_m3_vl", kSoftmaxShared,
        [](Model& m) {
          m.score = Sigmoid;
          m.selection_bias = Required;
          m.activation = SwiGluOai;
        }),
    row("mistral4", "transformers mistral4", kSoftmaxShared,
        [](Model& m) {
          m.guard = NormGuard::AddEps;
          m.guard_eps = 1e-20F;
          m.group_mask = GroupMask::Zero;
        }),
    row("mixtral", "transformers mixtral", kSoftmaxShared),
    row("nemotron_h", "transformers nemotron_h", kDeepSeekV3,
        [](Model& m) { m.activation = ReluSquared; }),
    row("nomic_bert_moe", "llama.cpp bert.cpp", kLlamaCpp,
        [](Model& m) {
          m.renormalize = false;
          m.activation = GeluTanh;
        }),
    row("olmoe", "transformers olmoe", kSoftmax, [](Model& m) { m.renormalize = false; }),
    row("phimoe", "llama.cpp phi3.cpp", kLlamaCpp),
    row("qwen2_moe", "transformers qwen2_moe", kSoftmaxGatedShared,
        [](Model& m) { m.renormalize = false; }),
    row("qwen3_moe", "transformers qwen3_moe", kSoftmax),
    row("qwen3_next", "transformers qwen3_next", kSoftmaxGatedShared),
    row("smallthinker", "llama.cpp smallthinker.cpp", kLlamaCpp,
        [](Model& m) {
          m.activation = ReGlu;
          m.router_input = RouterInput::Separate;
        }),
    row("step35", "llama.cpp step35.cpp", kLlamaCppSigmoid,
        [](Model& m) { m.activation = SwiGluClampOutput; }),
};

}  // namespace model_rows

using model_rows::kModels;

/// The row of a name; does not compile without one.
consteval const Model* model_of(std::string_view name) {
  for (const Model& model : kModels) {
    if (model.name == name) return &model;
  }
  throw "no such model";
}

}  // namespace moesaic
