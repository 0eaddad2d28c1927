#include "config.hpp"
#include "fields.hpp"
#include "gguf.hpp"
#include "text.hpp"

namespace moesaic::python {
namespace {

/// A router of other experts than the layer has would be found out when the layer is made.
void check_router(const MoeConfig& config) {
  const auto check = [&](const char* what, std::int32_t expected, std::int32_t got) {
    require<ConfigError>(expected == got, [&] {
      return Problem{"MoeConfig", std::string("router.") + what,
                     std::to_string(expected) + ", as the layer has", std::to_string(got),
                     "give a router= that fits, such as config.router.replace(...)"};
    });
  };
  check("num_experts without identity experts", config.num_experts,
        config.router.weighted_experts());
  check("top_k", config.top_k, config.router.top_k);
}

/// Sizes that no layer can have are found here, by their names.
void check_sizes(const MoeConfig& config) {
  const auto check = [](const char* name, std::int64_t least, std::int64_t got) {
    require<ConfigError>(got >= least, [&] {
      return Problem{
          "MoeConfig", name, "at least " + std::to_string(least), std::to_string(got), {}};
    });
  };
  check("hidden_size", 1, config.hidden_size);
  check("intermediate_size", 1, config.intermediate_size);
  check("shared_intermediate_size", 0, config.shared_intermediate_size);
  check("latent_size", 0, config.latent_size);
  check("vocab_size", 0, config.vocab_size);
  check("layer", 0, config.layer);
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
             check_sizes(c);
             check_router(c);
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
  define_value(config,
               Fields<MoeConfig>("MoeConfig")
                   .add("hidden_size", &MoeConfig::hidden_size)
                   .add("intermediate_size", &MoeConfig::intermediate_size)
                   .add("num_experts", &MoeConfig::num_experts)
                   .add("top_k", &MoeConfig::top_k)
                   .add("activation", &MoeConfig::activation)
                   .add("router", &MoeConfig::router)
                   .add("shared", &MoeConfig::shared)
                   .add("shared_intermediate_size", &MoeConfig::shared_intermediate_size)
                   .add("shared_activation", &MoeConfig::shared_activation)
                   .add("shared_scale", &MoeConfig::shared_scale)
                   .add("latent_size", &MoeConfig::latent_size)
                   .add("latent_norm", &MoeConfig::latent_norm)
                   .add("input_norm", &MoeConfig::input_norm)
                   .add("router_input", &MoeConfig::router_input)
                   .add("norm_eps", &MoeConfig::norm_eps)
                   .add("vocab_size", &MoeConfig::vocab_size)
                   .add("architecture", &MoeConfig::architecture)
                   .add("layer", &MoeConfig::layer),
               constructed<MoeConfig>());
}

}  // namespace moesaic::python
