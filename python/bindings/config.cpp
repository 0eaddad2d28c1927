#include "config.hpp"

#include <pybind11/stl.h>

#include <cmath>

#include "moesaic/gguf.hpp"

namespace moesaic::python {
namespace {

py::dict to_dict(const Activation& a) {
  py::dict d;
  d["kind"] = name_of(a.kind);
  d["limit"] = a.limit;
  d["alpha"] = a.alpha;
  d["beta"] = a.beta;
  d["linear_beta"] = a.linear_beta;
  return d;
}

py::dict to_dict(const RouterConfig& r) {
  py::dict d;
  d["num_experts"] = r.num_experts;
  d["top_k"] = r.top_k;
  d["score"] = name_of(r.score);
  d["renormalize"] = r.renormalize;
  d["guard"] = name_of(r.guard);
  d["guard_eps"] = r.guard_eps;
  d["scale"] = r.scale;
  d["select_on"] = name_of(r.select_on);
  d["num_groups"] = r.num_groups;
  d["groups_used"] = r.groups_used;
  d["group_reduce"] = name_of(r.group_reduce);
  d["group_mask"] = name_of(r.group_mask);
  d["weight_on"] = name_of(r.weight_on);
  d["identity_experts"] = r.identity_experts;
  d["router_bias"] = r.router_bias;
  d["selection_bias"] = r.selection_bias;
  return d;
}

py::dict to_dict(const MoeConfig& c) {
  py::dict d;
  d["hidden_size"] = c.hidden_size;
  d["intermediate_size"] = c.intermediate_size;
  d["num_experts"] = c.num_experts;
  d["top_k"] = c.top_k;
  d["activation"] = c.activation;
  d["router"] = c.router;
  d["shared"] = name_of(c.shared);
  d["shared_intermediate_size"] = c.shared_intermediate_size;
  d["shared_activation"] = c.shared_activation;
  d["latent_size"] = c.latent_size;
  d["latent_norm"] = c.latent_norm;
  d["input_norm"] = c.input_norm;
  d["router_input"] = name_of(c.router_input);
  d["norm_eps"] = c.norm_eps;
  d["vocab_size"] = c.vocab_size;
  d["architecture"] = c.architecture;
  d["layer"] = c.layer;
  return d;
}

/// to_dict, replace, ==, repr and one read-only property per field, all from the field dict.
template <class T>
void define_fields(py::class_<T>& type, const char* name,
                   std::initializer_list<std::pair<const char*, const char*>> fields) {
  type.def(
          "to_dict", [](const T& self) { return to_dict(self); }, "All fields by name.")
      .def(
          "replace",
          [](const py::object& self, const py::kwargs& changes) {
            const py::dict all = to_dict(self.cast<const T&>());
            all.attr("update")(changes);
            return py::type::of(self)(**all);
          },
          "A copy with some fields changed; checked as a new one.")
      .def("__eq__",
           [](const T& a, const py::object& b) -> py::object {
             if (!py::isinstance<T>(b))
               return py::reinterpret_borrow<py::object>(Py_NotImplemented);
             return py::bool_(to_dict(a).equal(to_dict(b.cast<const T&>())));
           })
      .def("__repr__", [label = std::string(name)](const T& self) {
        std::string text;
        for (const auto& [key, value] : to_dict(self))
          text += (text.empty() ? "" : ", ") + std::string(py::str(key)) + "=" +
                  std::string(py::repr(value));
        return "moesaic." + label + "(" + text + ")";
      });
  for (const auto& [field, help] : fields) {
    type.def_property_readonly(
        field,
        [key = std::string(field)](const T& self) {
          return py::object(to_dict(self)[key.c_str()]);
        },
        help);
  }
}

Activation make_activation(const std::string& kind, float limit, float alpha, float beta,
                           float linear_beta) {
  const auto check = [](bool ok, const char* name, const char* expected, float got) {
    require<ConfigError>(
        ok, [&] { return Problem{"Activation", name, expected, std::to_string(got), {}}; });
  };
  check(limit > 0.0F, "limit", "a positive number", limit);
  check(std::isfinite(alpha), "alpha", "a finite number", alpha);
  check(std::isfinite(beta) && beta > 0.0F, "beta", "a positive number", beta);
  check(std::isfinite(linear_beta) && linear_beta >= 0.0F, "linear_beta",
        "a finite number, not negative", linear_beta);
  return {parse_name<ActivationKind>(kind, "Activation", "activation"), limit, alpha, beta,
          linear_beta};
}

py::list architecture_rows() {
  py::list rows;
  for (const ArchitectureFacts& facts : architecture_table()) {
    py::dict d;
    d["architecture"] = facts.architecture;
    d["source"] = facts.source;
    d["score"] = facts.score;
    d["selection"] = facts.selection;
    d["renormalize"] = facts.renormalize;
    d["scale"] = facts.scale;
    d["activation"] = facts.activation;
    d["shared"] = facts.shared;
    d["notes"] = facts.notes;
    d["missing"] = facts.missing;
    rows.append(d);
  }
  return rows;
}

std::vector<std::string> kinds(const GgufFile& file) {
  std::vector<std::string> words;
  for (const LayerKind kind : layer_kinds(file)) words.emplace_back(name_of(kind));
  return words;
}

}  // namespace

Activation parse_activation(const py::object& value, const char* operation) {
  if (py::isinstance<Activation>(value)) return value.cast<Activation>();
  require<DTypeError>(py::isinstance<py::str>(value), [&] {
    return Problem{
        operation, "activation", "an Activation or its kind", Py_TYPE(value.ptr())->tp_name, {}};
  });
  Activation activation;
  activation.kind = parse_name<ActivationKind>(value.cast<std::string>(), operation, "activation");
  return activation;
}

RouterConfig call_router(const std::optional<RouterConfig>& router,
                         std::optional<std::int32_t> top_k, std::optional<bool> renormalize,
                         std::int32_t num_experts, const char* operation) {
  if (router) {
    require<ConfigError>(!top_k && !renormalize, [&] {
      return Problem{
          operation, "router", "either a RouterConfig or top_k and renormalize", "both", {}};
    });
    return *router;
  }
  require<ConfigError>(top_k.has_value(), [&] {
    return Problem{operation, "top_k", "top_k or a RouterConfig", "neither", {}};
  });
  RouterConfig config;
  config.num_experts = num_experts;
  config.top_k = *top_k;
  config.renormalize = renormalize.value_or(true);
  config.validate();
  return config;
}

void bind_config(py::module_& m) {
  py::class_<Activation> activation(
      m, "Activation", py::is_final(),
      "What happens between gate/up and down. Kinds: swiglu, swiglu_clamp_input,\n"
      "swiglu_clamp_output, swiglu_oai, geglu_tanh, reglu, gelu_tanh, relu_squared, situ.");
  activation
      .def(py::init(&make_activation), py::arg("kind") = "swiglu", py::kw_only(),
           py::arg("limit") = 7.0F, py::arg("alpha") = 1.702F, py::arg("beta") = 1.0F,
           py::arg("linear_beta") = 0.0F,
           "Raises ConfigError: an unknown kind, or a number without meaning.")
      .def_property_readonly("gated", &Activation::gated, "Whether it reads a gate row.")
      .def("__call__", &activate, py::arg("g"), py::arg("u"), "The scalar definition.");
  define_fields(activation, "Activation",
                {{"kind", "Name of the formula."},
                 {"limit", "L of the clamped forms."},
                 {"alpha", "Of swiglu_oai."},
                 {"beta", "b of situ."},
                 {"linear_beta", "lb of situ; 0 means plain u."}});

  py::class_<RouterConfig> router(
      m, "RouterConfig", py::is_final(),
      "A router, factored into independent facts. In order: logits (+ router_bias), score,\n"
      "selection (+ selection_bias, groups), top-k, weights from the unbiased scores,\n"
      "renormalisation, scale.");
  router.def(
      py::init([](std::int32_t num_experts, std::int32_t top_k, const std::string& score,
                  bool renormalize, const std::string& guard, float guard_eps, float scale,
                  const std::string& select_on, std::int32_t num_groups, std::int32_t groups_used,
                  const std::string& group_reduce, const std::string& group_mask,
                  const std::string& weight_on, std::int32_t identity_experts,
                  std::vector<float> router_bias, std::vector<float> selection_bias) {
        constexpr const char* kOperation = "RouterConfig";
        RouterConfig r;
        r.num_experts = num_experts;
        r.top_k = top_k;
        r.score = parse_name<ScoreFunction>(score, kOperation, "score");
        r.renormalize = renormalize;
        r.guard = parse_name<NormGuard>(guard, kOperation, "guard");
        r.guard_eps = guard_eps;
        r.scale = scale;
        r.select_on = parse_name<SelectOn>(select_on, kOperation, "select_on");
        r.num_groups = num_groups;
        r.groups_used = groups_used;
        r.group_reduce = parse_name<GroupReduce>(group_reduce, kOperation, "group_reduce");
        r.group_mask = parse_name<GroupMask>(group_mask, kOperation, "group_mask");
        r.weight_on = parse_name<WeightOn>(weight_on, kOperation, "weight_on");
        r.identity_experts = identity_experts;
        r.router_bias = std::move(router_bias);
        r.selection_bias = std::move(selection_bias);
        r.validate();
        return r;
      }),
      py::arg("num_experts"), py::arg("top_k"), py::kw_only(), py::arg("score") = "softmax",
      py::arg("renormalize") = true, py::arg("guard") = "none", py::arg("guard_eps") = 0.0F,
      py::arg("scale") = 1.0F, py::arg("select_on") = "scores", py::arg("num_groups") = 1,
      py::arg("groups_used") = 1, py::arg("group_reduce") = "top2_sum",
      py::arg("group_mask") = "minus_infinity", py::arg("weight_on") = "output",
      py::arg("identity_experts") = 0, py::arg("router_bias") = std::vector<float>{},
      py::arg("selection_bias") = std::vector<float>{},
      "Raises ConfigError on a contradiction (top_k > num_experts, ...).");
  define_fields(
      router, "RouterConfig",
      {{"num_experts", "E of the logits, identity experts included."},
       {"top_k", "Experts per token."},
       {"score", "softmax | softmax_selected | sigmoid | sqrt_softplus."},
       {"renormalize", "Whether the selected weights are made to sum to one."},
       {"guard", "Of that division: none | add_eps | clamp_min."},
       {"guard_eps", "The guard's epsilon."},
       {"scale", "Factor on the weights; 0 and 1 both mean none."},
       {"select_on", "What top-k reads: scores | logits | given (ids come with the call)."},
       {"num_groups", "Groups of experts."},
       {"groups_used", "Groups a token may use."},
       {"group_reduce", "Score of a group: top2_sum | max."},
       {"group_mask", "What experts of other groups become: minus_infinity | zero."},
       {"weight_on", "output | input (x is scaled before the expert)."},
       {"identity_experts", "The last ids, without weights: they give x itself."},
       {"router_bias", "Empty or [E], added to the logits."},
       {"selection_bias", "Empty or [E], added for the selection only."}});

  py::class_<MoeConfig> config(m, "MoeConfig", py::is_final(),
                               "Facts of one MoE layer of a model; immutable.");
  config
      .def(py::init([](std::int64_t hidden_size, std::int64_t intermediate_size,
                       std::int32_t num_experts, std::int32_t top_k, const py::object& activation,
                       const std::optional<RouterConfig>& router, const std::string& shared,
                       std::int64_t shared_intermediate_size, const py::object& shared_activation,
                       std::int64_t latent_size, bool latent_norm, bool input_norm,
                       const std::string& router_input, float norm_eps, std::int64_t vocab_size,
                       const std::string& architecture, std::int32_t layer) {
             constexpr const char* kOperation = "MoeConfig";
             MoeConfig c;
             c.hidden_size = hidden_size;
             c.intermediate_size = intermediate_size;
             c.num_experts = num_experts;
             c.top_k = top_k;
             c.activation = parse_activation(activation, kOperation);
             c.router =
                 router ? *router : call_router({}, top_k, std::nullopt, num_experts, kOperation);
             c.shared = parse_name<SharedKind>(shared, kOperation, "shared");
             c.shared_intermediate_size = shared_intermediate_size;
             c.shared_activation = shared_activation.is_none()
                                       ? c.activation
                                       : parse_activation(shared_activation, kOperation);
             c.latent_size = latent_size;
             c.latent_norm = latent_norm;
             c.input_norm = input_norm;
             c.router_input = parse_name<RouterInput>(router_input, kOperation, "router_input");
             c.norm_eps = norm_eps;
             c.vocab_size = vocab_size;
             c.architecture = architecture;
             c.layer = layer;
             return c;
           }),
           py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("num_experts"),
           py::arg("top_k"), py::kw_only(), py::arg("activation") = "swiglu",
           py::arg("router") = py::none(), py::arg("shared") = "none",
           py::arg("shared_intermediate_size") = 0, py::arg("shared_activation") = py::none(),
           py::arg("latent_size") = 0, py::arg("latent_norm") = false,
           py::arg("input_norm") = false, py::arg("router_input") = "experts",
           py::arg("norm_eps") = 1e-6F, py::arg("vocab_size") = 0, py::arg("architecture") = "",
           py::arg("layer") = 0,
           "Without `router`: softmax, renormalised. shared_activation None: as activation.")
      .def_static(
          "from_gguf", &MoeConfig::from_gguf, py::arg("file"), py::arg("layer"),
          "Read one layer's facts. Raises UnsupportedError naming an architecture without a\n"
          "preset or the part that it needs and that is missing here, FormatError for missing,\n"
          "unknown or contradictory values, ShapeError for a layer without experts.");
  define_fields(config, "MoeConfig",
                {{"hidden_size", "H of x and of y."},
                 {"intermediate_size", "I of a routed expert."},
                 {"num_experts", "Experts with weights."},
                 {"top_k", "Experts per token."},
                 {"activation", "Activation."},
                 {"router", "RouterConfig."},
                 {"shared", "Shared experts: none | plain | sigmoid_gated."},
                 {"shared_intermediate_size", "I of all shared experts together."},
                 {"shared_activation", "Activation of the shared experts."},
                 {"latent_size", "Width at which the experts run; 0: at H."},
                 {"latent_norm", "Whether the latent sum passes an RMS norm."},
                 {"input_norm", "Whether x passes an RMS norm before the experts."},
                 {"router_input", "What the router reads: experts | norm | separate."},
                 {"norm_eps", "Of these RMS norms."},
                 {"vocab_size", "Rows of the table that routes by token id; 0: no table."},
                 {"architecture", "GGUF architecture string, or the caller's own."},
                 {"layer", "Block number in the model."}});

  m.def("known_architectures", &known_architectures,
        "GGUF architecture strings whose MoE layers open.");
  m.def("architecture_table", &architecture_rows,
        "The presets in words, a dict per architecture: architecture, source, score, selection,\n"
        "renormalize, scale, activation, shared, notes, missing (the part that keeps its layers\n"
        "from opening, or ''). 'key' marks what a file's metadata decides.");
  m.def("layer_kinds", &kinds, py::arg("file").none(false),
        "The feed-forward part of each block of a file: 'dense', 'moe' or 'none', by the tensors\n"
        "that it holds.");
}

}  // namespace moesaic::python
