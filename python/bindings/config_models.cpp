#include <pybind11/stl.h>

#include "config.hpp"
#include "gguf.hpp"
#include "model/model.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

py::list architecture_rows() {
  py::list rows;
  for (const ArchitectureFacts& facts : architecture_table()) {
    py::dict d;
    d["architecture"] = facts.architecture;
    d["source"] = facts.source;
    d["model_types"] = facts.model_types;
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

std::vector<std::string> kinds(const py::object& file) {
  std::vector<std::string> words;
  for (const LayerKind kind : layer_kinds(*gguf_file(file, "layer_kinds")))
    words.emplace_back(name_of(kind));
  return words;
}

/// One row of the table of models, for the readers of Hugging Face configurations.
py::dict model_facts(const std::string& name) {
  const Model& model = find_model(name);
  py::dict d;
  d["source"] = model.source;
  d["score"] = name_of(model.score);
  d["select_on"] = name_of(model.select_on);
  d["group_reduce"] = name_of(model.group_reduce);
  d["group_mask"] = name_of(model.group_mask);
  d["renormalize"] = model.renormalize;
  d["guard"] = name_of(model.guard);
  d["guard_eps"] = model.guard_eps;
  d["weight_on"] = name_of(model.weight_on);
  d["router_bias"] = name_of(model.router_bias);
  d["selection_bias"] = name_of(model.selection_bias);
  d["activation"] = name_of(model.activation);
  d["gated"] = Activation{model.activation}.gated();
  d["shared"] = name_of(model.shared);
  d["input_norm"] = model.input_norm;
  d["router_input"] = name_of(model.router_input);
  return d;
}

template <class E>
std::optional<E> optional_name(const std::optional<std::string>& text, const char* what) {
  if (!text) return std::nullopt;
  return parse_name<E>(*text, "model_config", what);
}

MoeConfig model_config(const std::string& model, const Text& architecture, std::int32_t layer,
                       std::int64_t hidden_size, std::int64_t intermediate_size,
                       std::int32_t num_experts, std::int32_t top_k,
                       const std::optional<std::string>& score, std::optional<bool> renormalize,
                       std::optional<double> guard_eps, double scale, std::int32_t num_groups,
                       std::int32_t groups_used, std::int32_t identity_experts,
                       std::int64_t vocab_size, const std::optional<std::string>& activation,
                       std::optional<double> limit, std::optional<double> alpha,
                       std::int64_t shared_intermediate_size, std::optional<bool> averaged,
                       std::int64_t latent_size, double norm_eps) {
  LayerValues values;
  values.architecture = architecture.bytes;
  values.layer = layer;
  values.hidden_size = hidden_size;
  values.intermediate_size = intermediate_size;
  values.num_experts = num_experts;
  values.top_k = top_k;
  values.score = optional_name<ScoreFunction>(score, "score");
  values.renormalize = renormalize;
  values.guard_eps = guard_eps;
  values.scale = scale;
  values.num_groups = num_groups;
  values.groups_used = groups_used;
  values.identity_experts = identity_experts;
  values.vocab_size = vocab_size;
  values.activation = optional_name<ActivationKind>(activation, "activation");
  values.limit = limit;
  // Hugging Face configurations have one limit for all experts.
  values.shared_limit = limit;
  values.alpha = alpha;
  values.shared_intermediate_size = shared_intermediate_size;
  values.averaged = averaged;
  values.latent_size = latent_size;
  values.norm_eps = norm_eps;
  return make_config(find_model(model), std::move(values));
}

}  // namespace

void bind_models(py::module_& m) {
  m.def("known_architectures", &known_architectures);
  m.def("architecture_table", &architecture_rows);
  m.def("layer_kinds", &kinds, py::arg("file"));
  m.def("model_facts", &model_facts, py::arg("model"));
  m.def("model_config", &model_config, py::arg("model"), py::kw_only(), py::arg("architecture"),
        py::arg("layer"), py::arg("hidden_size"), py::arg("intermediate_size"),
        py::arg("num_experts"), py::arg("top_k"), py::arg("score") = py::none(),
        py::arg("renormalize") = py::none(), py::arg("guard_eps") = py::none(),
        py::arg("scale") = 1.0, py::arg("num_groups") = 1, py::arg("groups_used") = 1,
        py::arg("identity_experts") = 0, py::arg("vocab_size") = 0,
        py::arg("activation") = py::none(), py::arg("limit") = py::none(),
        py::arg("alpha") = py::none(), py::arg("shared_intermediate_size") = 0,
        py::arg("averaged") = py::none(), py::arg("latent_size") = 0, py::arg("norm_eps") = 1e-6);
}

}  // namespace moesaic::python
