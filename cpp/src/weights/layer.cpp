#include "moesaic/layer.hpp"

#include <algorithm>
#include <cmath>
#include <utility>

#include "model/presets.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/gguf.hpp"
#include "weights/check_parts.hpp"
#include "weights/load.hpp"

namespace moesaic {
namespace {

constexpr const char* kName = "MoeLayer";

template <class T>
void check_equal(const char* what, T expected, T got) {
  require<ShapeError>(expected == got, [&] {
    return Problem{.operation = "MoeLayer",
                   .what = what,
                   .expected = std::to_string(expected),
                   .got = std::to_string(got),
                   .hint = {}};
  });
}

void check_count(const char* what, std::int64_t expected, std::size_t got) {
  check_equal(what, expected, static_cast<std::int64_t>(got));
}

/// Throws ShapeError unless a part is there exactly when the config says so.
void check_present(const char* what, bool expected, bool got) {
  require<ShapeError>(expected == got, [&] {
    return Problem{.operation = "MoeLayer",
                   .what = what,
                   .expected = expected ? "the config's" : "none, as the config says",
                   .got = got ? "some" : "none",
                   .hint = {}};
  });
}

void check_table(const MoeConfig& config, const std::vector<std::int32_t>& table) {
  check_count("token_experts elements", config.vocab_size * config.top_k, table.size());
  require<ConfigError>(table.empty() || config.router.select_on == SelectOn::Given, [] {
    return Problem{.operation = "MoeLayer",
                   .what = "router.select_on",
                   .expected = "given, for a layer with a table of experts by token",
                   .got = "scores or logits",
                   .hint = {}};
  });
  const auto bad = std::ranges::find_if(
      table, [&](std::int32_t id) { return id < -1 || id >= config.router.num_experts; });
  require<ShapeError>(bad == table.end(), [&] {
    return Problem{.operation = "MoeLayer",
                   .what = "token_experts[" + std::to_string((bad - table.begin()) / config.top_k) +
                           ", " + std::to_string((bad - table.begin()) % config.top_k) + "]",
                   .expected = "-1 to " + std::to_string(config.router.num_experts - 1),
                   .got = std::to_string(*bad),
                   .hint = {}};
  });
}

const GgufTensor& need(const GgufTensor* tensor, std::int32_t layer, const char* name) {
  require<FormatError>(tensor != nullptr, [&] {
    return Problem{.operation = "MoeLayer::from_gguf",
                   .what = "layer " + std::to_string(layer),
                   .expected = "blk." + std::to_string(layer) + "." + name,
                   .got = "no such tensor",
                   .hint = {}};
  });
  return *tensor;
}

}  // namespace

MoeLayer::MoeLayer(MoeConfig config, Parts parts)
    : config_(std::move(config)), parts_(std::move(parts)) {
  require<ShapeError>(parts_.stack != nullptr, [] {
    return Problem{.operation = "MoeLayer",
                   .what = "stack",
                   .expected = "an ExpertStack",
                   .got = "null",
                   .hint = {}};
  });
  require<UnsupportedError>(parts_.residency == nullptr || parts_.stack->low_rank() == 0, [] {
    return Problem{.operation = "MoeLayer",
                   .what = "stack",
                   .expected = "no low-rank deltas, as the experts run from a store",
                   .got = "some",
                   .hint = "bake the deltas"};
  });
  require<ConfigError>(std::isfinite(config_.norm_eps) && config_.norm_eps >= 0.0F, [&] {
    return Problem{.operation = "MoeLayer",
                   .what = "norm_eps",
                   .expected = "a finite number, not negative",
                   .got = std::to_string(config_.norm_eps),
                   .hint = {}};
  });
  const std::int64_t hidden = config_.hidden_size;
  const StackShape& shape = parts_.stack->shape();
  config_.router.validate();
  check_equal("num_experts", config_.num_experts, shape.num_experts);
  check_equal(config_.latent_size > 0 ? "latent_size" : "hidden_size",
              config_.latent_size > 0 ? config_.latent_size : hidden, shape.hidden_size);
  check_equal("intermediate_size", config_.intermediate_size, shape.intermediate_size);
  check_equal("router.num_experts without identity experts", config_.num_experts,
              config_.router.weighted_experts());
  check_equal("router.top_k", config_.top_k, config_.router.top_k);
  weights::check_gate(kName, "stack", *parts_.stack, config_.activation);
  if (!parts_.router_weight.empty()) {
    check_count("router_weight elements", config_.router.num_experts * hidden,
                parts_.router_weight.size());
  }
  check_present("shared experts", config_.shared != SharedKind::None, parts_.shared.has_value());
  if (parts_.shared) {
    // Shared experts from elsewhere than from_gguf come without the factor.
    if (const float factor = config_.shared_scale / parts_.shared->scale; factor != 1.0F) {
      require<ConfigError>(std::isfinite(factor), [&] {
        return Problem{.operation = "MoeLayer",
                       .what = "shared_scale",
                       .expected = "a finite number",
                       .got = std::to_string(config_.shared_scale),
                       .hint = {}};
      });
      parts_.shared->stack = weights::scale_result(parts_.shared->stack, factor);
      parts_.shared->scale = config_.shared_scale;
    }
    parts_.shared->activation = config_.shared_activation;
    weights::check_shared(kName, *parts_.shared, hidden);
    check_equal("shared.intermediate_size", config_.shared_intermediate_size,
                parts_.shared->stack.shape().intermediate_size);
    check_present("shared gate", config_.shared == SharedKind::SigmoidGated,
                  !parts_.shared->gate.empty());
  }
  check_present("latent experts", config_.latent_size > 0, parts_.latent.has_value());
  if (parts_.latent) {
    check_equal("latent.hidden_size", hidden, parts_.latent->projections.shape().hidden_size);
    weights::check_latent(kName, *parts_.latent, shape);
    check_present("latent norm", config_.latent_norm, static_cast<bool>(parts_.latent->norm));
  }
  check_present("input norm", config_.input_norm, static_cast<bool>(parts_.input_norm));
  weights::check_norm(kName, "input norm", parts_.input_norm, hidden);
  check_present("router norm", config_.router_input == RouterInput::Norm,
                static_cast<bool>(parts_.router_norm));
  weights::check_norm(kName, "router norm", parts_.router_norm, hidden);
  check_table(config_, parts_.token_experts);
  if (parts_.stack->device().type != DeviceType::Cpu) {
    const Backend& backend = backend_for(parts_.stack->device());
    const auto pin = [&](const auto& values) {
      pins_.handles.push_back(backend.pin(host_values(values)));
    };
    pin(config_.router.router_bias);
    pin(config_.router.selection_bias);
    pin(parts_.router_weight);
    pin(parts_.input_norm.weight);
    pin(parts_.router_norm.weight);
    pin(parts_.token_experts);
    if (parts_.shared) pin(parts_.shared->gate);
    if (parts_.latent) pin(parts_.latent->norm.weight);
  }
}

namespace {

/// The parts of `config` that a file stores, around `stack`, or around the experts of the file.
/// `others` are the caller's tensors in this architecture.
MoeLayer::Parts load_parts(const std::shared_ptr<GgufFile>& file, const BlockReader& block,
                           const MoeConfig& config, std::string_view others,
                           const LoadOptions& options, std::shared_ptr<const ExpertStack> stack) {
  const std::int32_t layer = block.layer();
  const MoeTensors tensors = find_moe_tensors(*file, layer);
  const auto norm = [&](const GgufTensor* tensor, const char* name, std::int64_t size) {
    return RmsNorm{weights::decode_tensor(block, need(tensor, layer, name), {size}),
                   config.norm_eps};
  };
  if (config.activation.gated() && tensors.gate_up == nullptr && tensors.expert_gate.empty()) {
    need(tensors.gate, layer, "ffn_gate_exps.weight");
  }
  MoeLayer::Parts parts;
  parts.stack = std::move(stack);
  if (parts.stack == nullptr) {
    parts.stack =
        std::make_shared<const ExpertStack>(ExpertStack::load_from_gguf(file, layer, options));
  }
  parts.router_weight =
      weights::decode_tensor(block, need(tensors.router, layer, "ffn_gate_inp.weight"),
                             {config.num_experts, config.hidden_size});
  if (config.shared != SharedKind::None) {
    parts.shared.emplace(SharedExperts{
        .stack = weights::load_shared_experts(block, tensors, config.shared_scale, options),
        .scale = config.shared_scale});
    if (config.shared == SharedKind::SigmoidGated) {
      parts.shared->gate = weights::decode_tensor(
          block, need(tensors.shared_router, layer, "ffn_gate_inp_shexp.weight"),
          {config.hidden_size});
    }
  }
  if (config.latent_size > 0) {
    parts.latent.emplace(
        LatentExperts{.projections = weights::load_latent_projections(block, tensors, options)});
    if (config.latent_norm) {
      parts.latent->norm = norm(tensors.latent_norm, "ffn_routed_norm.weight", config.latent_size);
    }
  }
  if (config.input_norm) {
    parts.input_norm = norm(tensors.input_norm, "pre_ffw_norm_2.weight", config.hidden_size);
  }
  if (config.router_input == RouterInput::Norm) {
    parts.router_norm = norm(tensors.router_scale, "ffn_gate_inp.scale", config.hidden_size);
    // Gemma 4 divides the normed input of its router by sqrt(H), which the weight takes up here.
    const float factor = 1.0F / std::sqrt(static_cast<float>(config.hidden_size));
    for (float& w : parts.router_norm.weight) w *= factor;
  }
  if (config.vocab_size > 0) {
    parts.token_experts =
        weights::read_ids(block, need(tensors.token_experts, layer, "ffn_gate_tid2eid.weight"),
                          {config.vocab_size, config.top_k});
    // A table leaves nothing to select, so the bias that some of its layers store has no use.
    if (tensors.selection_bias != nullptr) block.bytes(*tensors.selection_bias);
  }
  block.check_all_used("MoeLayer::from_gguf", BlockReader::Scope::Rest, others);
  return parts;
}

/// Takes a bias of the router from the file. Throws ConfigError where the config has another one.
void take_bias(const BlockReader& block, const GgufTensor* tensor, const char* name,
               std::int32_t experts, std::vector<float>& bias) {
  if (tensor == nullptr) return;
  std::vector<float> stored = weights::decode_tensor(block, *tensor, {experts});
  require<ConfigError>(bias.empty() || bias == stored, [&] {
    return Problem{.operation = "MoeLayer::from_gguf",
                   .what = std::string("config.router.") + name,
                   .expected = "none, or the values of " + tensor->name,
                   .got = "others",
                   .hint = "a config holds the biases of one layer, so read it anew for each"};
  });
  bias = std::move(stored);
}

}  // namespace

MoeLayer MoeLayer::from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                             const LoadOptions& options) {
  return from_gguf(file, layer, options, nullptr, nullptr);
}

MoeLayer MoeLayer::from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                             const LoadOptions& options, std::shared_ptr<const ExpertStack> stack,
                             std::shared_ptr<ExpertResidency> residency) {
  const BlockReader block(*file, layer);
  MoeConfig config = read_config(block);
  const Preset* const preset = find_preset(config.architecture);
  Parts parts = load_parts(file, block, config, preset->others, options, std::move(stack));
  parts.residency = std::move(residency);
  return MoeLayer(std::move(config), std::move(parts));
}

MoeLayer MoeLayer::from_gguf_with_config(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                                         MoeConfig config, const LoadOptions& options) {
  const BlockReader block(*file, layer);
  const MoeTensors tensors = find_moe_tensors(*file, layer);
  require<FormatError>(tensors.has_experts(), [&] {
    return Problem{.operation = "MoeLayer::from_gguf",
                   .what = "layer " + std::to_string(layer),
                   .expected = "experts",
                   .got = "none",
                   .hint = "GgufFile.moe_layers lists the layers with experts"};
  });
  RouterConfig& router = config.router;
  take_bias(block, tensors.router_bias, "router_bias", config.num_experts, router.router_bias);
  if (router.select_on != SelectOn::Given) {
    take_bias(block, tensors.selection_bias, "selection_bias", config.num_experts,
              router.selection_bias);
  }
  // Whoever writes a config knows what else the block has; the formula of a known one is known.
  const Preset* const preset = find_preset(file->string("general.architecture").value_or(""));
  constexpr std::string_view kBeside =
      "ffn_gate ffn_up ffn_down post_ffw_norm_1 post_ffw_norm_2 exp_probs_b_vl";
  Parts parts = load_parts(file, block, config, preset != nullptr ? preset->others : kBeside,
                           options, nullptr);
  return MoeLayer(std::move(config), std::move(parts));
}

}  // namespace moesaic
