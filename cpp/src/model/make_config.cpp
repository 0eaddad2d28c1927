#include <algorithm>
#include <utility>

#include "model/model.hpp"
#include "moesaic/error.hpp"

namespace moesaic {
namespace {

/// llama.cpp's files write a limit of 0 for layers without a clamp.
constexpr double kLimitOff = 1e-6;

bool is_clamped(ActivationKind kind) {
  return kind == ActivationKind::SwiGluClampInput || kind == ActivationKind::SwiGluClampOutput;
}

/// `kind` with the numbers that it reads. A clamped form without a limit is plain SwiGLU.
Activation make_activation(ActivationKind kind, std::optional<double> limit,
                           const LayerValues& values) {
  Activation activation;
  if (is_clamped(kind) && (!limit || *limit <= kLimitOff)) return activation;
  activation.kind = kind;
  const auto set = [](float& number, const std::optional<double>& value) {
    if (value) number = static_cast<float>(*value);
  };
  if (is_clamped(kind) || kind == ActivationKind::SwiGluOai) set(activation.limit, limit);
  if (kind == ActivationKind::SwiGluOai) set(activation.alpha, values.alpha);
  if (kind == ActivationKind::SiTu) {
    set(activation.beta, values.beta);
    set(activation.linear_beta, values.linear_beta);
  }
  return activation;
}

RouterConfig make_router(const Model& model, LayerValues& values) {
  RouterConfig router;
  router.num_experts = values.num_experts + values.identity_experts;
  router.top_k = values.top_k;
  router.score = values.score.value_or(model.score);
  router.renormalize = values.renormalize.value_or(model.renormalize);
  router.guard = model.guard;
  router.guard_eps = static_cast<float>(values.guard_eps.value_or(model.guard_eps));
  // Writers say 0 where nothing is scaled.
  router.scale = values.scale == 0.0 ? 1.0F : static_cast<float>(values.scale);
  router.select_on = values.vocab_size > 0 ? SelectOn::Given : model.select_on;
  router.num_groups = values.num_groups;
  router.groups_used = values.groups_used;
  router.group_reduce = model.group_reduce;
  router.group_mask = model.group_mask;
  router.weight_on = model.weight_on;
  router.identity_experts = values.identity_experts;
  router.router_bias = std::move(values.router_bias);
  router.selection_bias = std::move(values.selection_bias);
  router.validate();
  return router;
}

}  // namespace

const Model& find_model(std::string_view name) {
  const auto at = std::ranges::find(models(), name, &Model::name);
  require<ConfigError>(at != models().end(), [&] {
    std::string known;
    for (const Model& model : models())
      known += (known.empty() ? "" : ", ") + std::string(model.name);
    return Problem{"find_model", "model", known, "'" + std::string(name) + "'", {}};
  });
  return *at;
}

MoeConfig make_config(const Model& model, LayerValues values) {
  MoeConfig config;
  config.router = make_router(model, values);
  config.architecture = std::move(values.architecture);
  config.layer = values.layer;
  config.hidden_size = values.hidden_size;
  config.intermediate_size = values.intermediate_size;
  config.num_experts = values.num_experts;
  config.top_k = values.top_k;
  config.vocab_size = values.vocab_size;

  const ActivationKind kind = values.activation.value_or(model.activation);
  config.activation = make_activation(kind, values.limit, values);
  const bool own_limit = is_clamped(kind);
  const auto shared_limit = model.shared_clamped ? values.shared_limit : std::nullopt;
  config.shared_activation = make_activation(kind, own_limit ? shared_limit : values.limit, values);
  config.shared = values.shared_intermediate_size > 0 ? model.shared : SharedKind::None;
  config.shared_intermediate_size = values.shared_intermediate_size;

  if (values.averaged.value_or(model.averaged) && config.shared != SharedKind::None) {
    config.router.scale *= 0.5F;
    config.shared_scale = 0.5F;
  }

  config.latent_size = values.latent_size;
  config.latent_norm = values.latent_norm;
  config.input_norm = model.input_norm;
  config.router_input = model.router_input;
  const bool has_norm =
      config.input_norm || config.latent_norm || config.router_input == RouterInput::Norm;
  if (has_norm) config.norm_eps = static_cast<float>(values.norm_eps);
  return config;
}

}  // namespace moesaic
