#pragma once

/// Layers with the rarer parts, inputs for them, and their results in f64, apart from every other
/// implementation.

#include <algorithm>
#include <cmath>
#include <optional>
#include <ostream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "layer_case.hpp"
#include "layers.hpp"

namespace moesaic::testing::parts {

inline constexpr std::int64_t kHidden = 96, kWidth = 64, kSharedWidth = 32, kLatent = 32,
                              kVocabulary = 11;
inline constexpr std::int32_t kExperts = 6, kTopK = 3;
inline constexpr float kEps = 1e-3F;

/// What a layer under test has.
struct Spec {
  const char* name;
  ActivationKind activation = ActivationKind::SwiGlu;
  bool epilogue = false;
  SharedKind shared = SharedKind::None;
  bool shared_clamped = false;
  WeightOn weight_on = WeightOn::Output;
  std::int32_t identity = 0;
  bool latent = false, latent_norm = false, input_norm = false;
  RouterInput router_input = RouterInput::Experts;
  SelectOn select_on = SelectOn::Scores;
  bool table = false;
  bool low_rank = false;
};

inline void PrintTo(const Spec& spec, std::ostream* out) { *out << spec.name; }

inline constexpr Spec kSpecs[] = {
    {.name = "plain"},
    {.name = "shared", .shared = SharedKind::Plain},
    {.name = "shared_gated_clamped", .shared = SharedKind::SigmoidGated, .shared_clamped = true},
    {.name = "input_weights", .weight_on = WeightOn::Input},
    {.name = "input_weights_epilogue",
     .epilogue = true,
     .shared = SharedKind::Plain,
     .weight_on = WeightOn::Input},
    {.name = "input_weights_ungated",
     .activation = ActivationKind::ReluSquared,
     .epilogue = true,
     .weight_on = WeightOn::Input},
    {.name = "identity", .identity = 3},
    {.name = "identity_shared_input",
     .shared = SharedKind::Plain,
     .weight_on = WeightOn::Input,
     .identity = 5},
    {.name = "latent",
     .activation = ActivationKind::ReluSquared,
     .shared = SharedKind::Plain,
     .latent = true},
    {.name = "latent_norm",
     .activation = ActivationKind::SiTu,
     .latent = true,
     .latent_norm = true},
    {.name = "input_norm", .input_norm = true},
    {.name = "two_norms",
     .activation = ActivationKind::GeGluTanh,
     .epilogue = true,
     .input_norm = true,
     .router_input = RouterInput::Norm},
    {.name = "separate",
     .activation = ActivationKind::ReGlu,
     .router_input = RouterInput::Separate},
    {.name = "given", .select_on = SelectOn::Given},
    {.name = "table",
     .activation = ActivationKind::SwiGluClampInput,
     .shared = SharedKind::Plain,
     .select_on = SelectOn::Given,
     .table = true},
    {.name = "swiglu_oai", .activation = ActivationKind::SwiGluOai, .epilogue = true},
    {.name = "clamp_output", .activation = ActivationKind::SwiGluClampOutput, .epilogue = true},
    {.name = "gelu", .activation = ActivationKind::GeluTanh, .epilogue = true},
    {.name = "everything",
     .epilogue = true,
     .shared = SharedKind::SigmoidGated,
     .weight_on = WeightOn::Input,
     .identity = 2,
     .latent = true,
     .latent_norm = true,
     .input_norm = true,
     .router_input = RouterInput::Norm},
};

/// What the CPU alone runs.
inline constexpr Spec kCpuSpecs[] = {
    {.name = "low_rank", .low_rank = true},
    {.name = "low_rank_ungated", .activation = ActivationKind::ReluSquared, .low_rank = true},
    {.name = "low_rank_everything",
     .epilogue = true,
     .shared = SharedKind::SigmoidGated,
     .weight_on = WeightOn::Input,
     .identity = 2,
     .latent = true,
     .latent_norm = true,
     .input_norm = true,
     .router_input = RouterInput::Norm,
     .low_rank = true},
};

/// A layer with its parts decoded, and inputs for it.
struct Model {
  Spec spec;
  std::int64_t narrow;  ///< hidden size of the experts
  Activation activation, shared_activation;
  TestRole gate, up, down, shared_gate, shared_up, shared_down, latent_down, latent_up;
  Floats router_weight, shared_router, input_norm, router_norm, latent_norm;
  std::vector<std::int32_t> table;

  explicit Model(const Spec& s)
      : spec(s),
        narrow(s.latent ? kLatent : kHidden),
        router_weight(random_values((kExperts + s.identity) * kHidden, 4, 0.3F)) {
    activation.kind = s.activation;
    activation.limit = 1.5F;
    activation.beta = 2.0F;
    activation.linear_beta = 3.0F;
    shared_activation = activation;
    if (s.shared_clamped) shared_activation.kind = ActivationKind::SwiGluClampOutput;
    shared_activation.limit = 0.5F;
    if (activation.gated()) gate = role(kExperts, kWidth, narrow, QuantType::Q8_0, 11);
    up = role(kExperts, kWidth, narrow, QuantType::Q8_0, 12);
    down = role(kExperts, narrow, kWidth, QuantType::F16, 13);
    if (s.shared != SharedKind::None) {
      if (shared_activation.gated()) {
        shared_gate = role(1, kSharedWidth, kHidden, QuantType::F32, 14);
      }
      shared_up = role(1, kSharedWidth, kHidden, QuantType::F32, 15);
      shared_down = role(1, kHidden, kSharedWidth, QuantType::Q8_0, 16);
    }
    if (s.shared == SharedKind::SigmoidGated) shared_router = random_values(kHidden, 17, 0.3F);
    if (s.latent) {
      latent_down = make_role(1, kLatent, kHidden, QuantType::Q8_0, 18, false);
      latent_up = make_role(1, kHidden, kLatent, QuantType::F16, 19, false);
    }
    if (s.latent_norm) latent_norm = random_factors(kLatent, 20);
    if (s.input_norm) input_norm = random_factors(kHidden, 21);
    if (s.router_input == RouterInput::Norm) router_norm = random_factors(kHidden, 22);
    for (std::int64_t i = 0; s.table && i < kVocabulary * kTopK; ++i) {
      table.push_back(static_cast<std::int32_t>((i * 5 + i / kTopK) % kExperts));
    }
  }

  TestRole role(std::int32_t experts, std::int64_t rows, std::int64_t cols, QuantType type,
                std::uint32_t seed) const {
    TestRole made = make_role(experts, rows, cols, type, seed, spec.epilogue && experts > 1);
    if (spec.low_rank) add_delta(made, static_cast<std::int64_t>(seed % 3) + 1, seed);
    return made;
  }

  MoeConfig config() const {
    MoeConfig c;
    c.hidden_size = kHidden;
    c.intermediate_size = kWidth;
    c.num_experts = kExperts;
    c.top_k = kTopK;
    c.activation = activation;
    c.shared_activation = shared_activation;
    c.router.num_experts = kExperts + spec.identity;
    c.router.top_k = kTopK;
    c.router.identity_experts = spec.identity;
    c.router.weight_on = spec.weight_on;
    c.router.select_on = spec.select_on;
    c.shared = spec.shared;
    c.shared_intermediate_size = spec.shared == SharedKind::None ? 0 : kSharedWidth;
    c.latent_size = spec.latent ? kLatent : 0;
    c.latent_norm = spec.latent_norm;
    c.input_norm = spec.input_norm;
    c.router_input = spec.router_input;
    c.norm_eps = kEps;
    c.vocab_size = spec.table ? kVocabulary : 0;
    return c;
  }

  static ExpertStack stack(const StackShape& shape, const TestRole& gate, const TestRole& up,
                           const TestRole& down, const Backend& backend) {
    ExpertStack::Parts parts;
    parts.shape = shape;
    parts.gate = gate.weights;
    parts.up = up.weights;
    parts.down = down.weights;
    LoadOptions options;
    options.backend = &backend;
    backend.prepare(parts, options);
    return ExpertStack(std::move(parts));
  }

  MoeLayer layer(const Backend& backend = backend_for(Device{})) const {
    MoeLayer::Parts parts;
    parts.stack = std::make_shared<const ExpertStack>(
        stack({kExperts, narrow, kWidth}, gate, up, down, backend));
    parts.router_weight = router_weight;
    if (spec.shared != SharedKind::None) {
      parts.shared.emplace(SharedExperts{
          stack({1, kHidden, kSharedWidth}, shared_gate, shared_up, shared_down, backend),
          shared_router});
    }
    if (spec.latent) {
      parts.latent.emplace(LatentExperts{
          stack({1, kHidden, kLatent}, {}, latent_down, latent_up, backend), {latent_norm, kEps}});
    }
    parts.input_norm = {input_norm, kEps};
    parts.router_norm = {router_norm, kEps};
    parts.token_experts = table;
    return {config(), std::move(parts)};
  }
};

inline Doubles normed(const Doubles& x, const Floats& weight) {
  if (weight.empty()) return x;
  double square = 0;
  for (const double v : x) square += v * v;
  const double root = std::sqrt(square / static_cast<double>(x.size()) + static_cast<double>(kEps));
  Doubles y(x.size());
  for (std::size_t i = 0; i < x.size(); ++i) y[i] = x[i] / root * static_cast<double>(weight[i]);
  return y;
}

inline Doubles ffn(const Activation& a, const TestRole& gate, const TestRole& up,
                   const TestRole& down, std::int32_t expert, Doubles x, double factor) {
  for (double& v : x) v *= factor;
  Doubles u = apply_f64(up, expert, x.data());
  const Doubles g = a.gated() ? apply_f64(gate, expert, x.data()) : Doubles(u.size());
  for (std::size_t i = 0; i < u.size(); ++i) {
    u[i] = activate_f64(a, g[i], u[i]);
  }
  return apply_f64(down, expert, u.data());
}

struct Chosen {
  std::vector<std::int32_t> ids;
  Doubles weights;
};

/// Softmax over all, the largest (or the given ones), renormalised.
inline Chosen choose(const Model& m, const Doubles& input, const std::int32_t* given) {
  const std::int32_t experts = kExperts + m.spec.identity;
  Doubles scores;
  double total = 0;
  for (std::int32_t e = 0; e < experts; ++e) {
    scores.push_back(
        std::exp(dot_f64(m.router_weight.data() + e * kHidden, input.data(), kHidden)));
    total += scores.back();
  }
  Chosen chosen;
  Doubles left = scores;
  double sum = 0;
  for (std::int32_t slot = 0; slot < kTopK; ++slot) {
    const auto best = std::max_element(left.begin(), left.end()) - left.begin();
    const auto id = given != nullptr ? given[slot] : static_cast<std::int32_t>(best);
    if (given == nullptr) left[static_cast<std::size_t>(best)] = -1;
    chosen.ids.push_back(id);
    chosen.weights.push_back(scores[static_cast<std::size_t>(id)] / total);
    sum += chosen.weights.back();
  }
  for (double& w : chosen.weights) w /= sum;
  return chosen;
}

/// One token in f64, apart from every other implementation.
inline Doubles token_f64(const Model& m, const Doubles& x, const Doubles& separate,
                         const std::int32_t* given, Chosen& chosen) {
  const bool on_input = m.spec.weight_on == WeightOn::Input;
  const Doubles input = normed(x, m.input_norm);
  const Doubles& raw = m.spec.router_input == RouterInput::Separate ? separate
                       : m.spec.router_input == RouterInput::Norm   ? x
                                                                    : input;
  chosen = choose(m, normed(raw, m.router_norm), given);

  const Doubles narrow = m.spec.latent ? apply_f64(m.latent_down, 0, input.data()) : input;
  Doubles routed(narrow.size());
  Doubles y(kHidden);
  for (std::size_t slot = 0; slot < chosen.ids.size(); ++slot) {
    const double w = chosen.weights[slot];
    if (chosen.ids[slot] >= kExperts) {
      for (std::size_t i = 0; i < y.size(); ++i) y[i] += w * input[i];
      continue;
    }
    const Doubles d =
        ffn(m.activation, m.gate, m.up, m.down, chosen.ids[slot], narrow, on_input ? w : 1.0);
    for (std::size_t i = 0; i < d.size(); ++i) routed[i] += (on_input ? 1.0 : w) * d[i];
  }
  if (m.spec.latent) {
    const Doubles sum = normed(routed, m.latent_norm);
    routed = apply_f64(m.latent_up, 0, sum.data());
  }
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += routed[i];
  if (m.spec.shared == SharedKind::None) return y;
  const Doubles shared =
      ffn(m.shared_activation, m.shared_gate, m.shared_up, m.shared_down, 0, input, 1.0);
  double w = 1.0;
  if (!m.shared_router.empty()) {
    w = 1.0 / (1.0 + std::exp(-dot_f64(m.shared_router.data(), input.data(), kHidden)));
  }
  for (std::size_t i = 0; i < y.size(); ++i) y[i] += w * shared[i];
  return y;
}

/// A call on `tokens` tokens with what the layer asks for.
struct Batch {
  std::int64_t tokens;
  Floats x, separate;
  std::vector<std::int32_t> token_ids, topk_ids;

  Batch(const Model& m, std::int64_t count)
      : tokens(count),
        x(random_values(count * kHidden, 31)),
        separate(random_values(count * kHidden, 32)) {
    for (std::int64_t t = 0; t < count; ++t) {
      token_ids.push_back(static_cast<std::int32_t>((3 * t + 1) % kVocabulary));
      for (std::int32_t slot = 0; slot < kTopK; ++slot) {
        topk_ids.push_back(static_cast<std::int32_t>((2 * t + slot) % kExperts));
      }
    }
    if (m.spec.table) {
      for (std::size_t pair = 0; pair < topk_ids.size(); ++pair) {
        const std::size_t token = pair / kTopK;
        topk_ids[pair] = m.table[static_cast<std::size_t>(token_ids[token]) * kTopK + pair % kTopK];
      }
    }
  }

  /// This batch through `layer`, which is `m` on some backend.
  LayerCase on(const Model& m, const LayerRef& layer = {}) {
    LayerCase c{.layer = layer, .x = rows_of(std::as_const(x), kHidden)};
    if (m.spec.router_input == RouterInput::Separate) {
      c.router_input = rows_of(std::as_const(separate), kHidden);
    }
    if (m.spec.table) {
      c.token_ids = ConstTensorView(token_ids.data(), DType::I32, {tokens});
    } else if (m.spec.select_on == SelectOn::Given) {
      c.routing = {topk_ids.data(), nullptr, tokens, kTopK};
    }
    return c;
  }
  ForwardIo io(const Model& m, const TensorView& out) { return on(m).io(out); }

  Doubles expected(const Model& m, std::vector<Chosen>& chosen) const {
    Doubles all;
    for (std::int64_t t = 0; t < tokens; ++t) {
      const auto row = [&](const Floats& v) {
        return Doubles(v.begin() + t * kHidden, v.begin() + (t + 1) * kHidden);
      };
      chosen.emplace_back();
      const bool given = m.spec.select_on == SelectOn::Given;
      const Doubles y = token_f64(m, row(x), row(separate),
                                  given ? topk_ids.data() + t * kTopK : nullptr, chosen.back());
      all.insert(all.end(), y.begin(), y.end());
    }
    return all;
  }
};

inline Spec spec_named(const std::string& name) {
  for (const Spec& s : kSpecs) {
    if (name == s.name) return s;
  }
  throw std::runtime_error("no spec " + name);
}

}  // namespace moesaic::testing::parts
