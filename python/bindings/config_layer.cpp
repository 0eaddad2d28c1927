#include "config.hpp"
#include "config_fields.hpp"
#include "gguf.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

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
  d["shared_scale"] = c.shared_scale;
  d["latent_size"] = c.latent_size;
  d["latent_norm"] = c.latent_norm;
  d["input_norm"] = c.input_norm;
  d["router_input"] = name_of(c.router_input);
  d["norm_eps"] = c.norm_eps;
  d["vocab_size"] = c.vocab_size;
  d["architecture"] = text_to_python(c.architecture);
  d["layer"] = c.layer;
  return d;
}

}  // namespace

void bind_moe_config(py::module_& m) {
  py::class_<MoeConfig> config(m, "MoeConfig", py::is_final());
  config
      .def(py::init([](std::int64_t hidden_size, std::int64_t intermediate_size,
                       std::int32_t num_experts, std::int32_t top_k, const py::object& activation,
                       const std::optional<RouterConfig>& router, const std::string& shared,
                       std::int64_t shared_intermediate_size, const py::object& shared_activation,
                       float shared_scale, std::int64_t latent_size, bool latent_norm,
                       bool input_norm, const std::string& router_input, float norm_eps,
                       std::int64_t vocab_size, const Text& architecture, std::int32_t layer) {
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
             c.shared_scale = shared_scale;
             c.latent_size = latent_size;
             c.latent_norm = latent_norm;
             c.input_norm = input_norm;
             c.router_input = parse_name<RouterInput>(router_input, kOperation, "router_input");
             c.norm_eps = norm_eps;
             c.vocab_size = vocab_size;
             c.architecture = architecture.bytes;
             c.layer = layer;
             return c;
           }),
           py::arg("hidden_size"), py::arg("intermediate_size"), py::arg("num_experts"),
           py::arg("top_k"), py::kw_only(), py::arg("activation") = "swiglu",
           py::arg("router") = py::none(), py::arg("shared") = "none",
           py::arg("shared_intermediate_size") = 0, py::arg("shared_activation") = py::none(),
           py::arg("shared_scale") = 1.0F, py::arg("latent_size") = 0,
           py::arg("latent_norm") = false, py::arg("input_norm") = false,
           py::arg("router_input") = "experts", py::arg("norm_eps") = 1e-6F,
           py::arg("vocab_size") = 0, py::arg("architecture") = "", py::arg("layer") = 0)
      .def_static(
          "from_gguf",
          [](const py::object& file, std::int32_t layer) {
            return MoeConfig::from_gguf(*gguf_file(file, "MoeConfig.from_gguf"), layer);
          },
          py::arg("file"), py::arg("layer"));
  define_fields(config, "MoeConfig", &to_dict,
                {"hidden_size", "intermediate_size", "num_experts", "top_k", "activation", "router",
                 "shared", "shared_intermediate_size", "shared_activation", "shared_scale",
                 "latent_size", "latent_norm", "input_norm", "router_input", "norm_eps",
                 "vocab_size", "architecture", "layer"});
}

}  // namespace moesaic::python
