#include "config.hpp"
#include "fields.hpp"

namespace moesaic::python {
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

void bind_router_config(py::module_& m) {
  py::class_<RouterConfig> router(m, "RouterConfig", py::is_final());
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
      py::arg("selection_bias") = std::vector<float>{});
  define_value(router,
               Fields<RouterConfig>("RouterConfig")
                   .add("num_experts", &RouterConfig::num_experts)
                   .add("top_k", &RouterConfig::top_k)
                   .add("score", &RouterConfig::score)
                   .add("renormalize", &RouterConfig::renormalize)
                   .add("guard", &RouterConfig::guard)
                   .add("guard_eps", &RouterConfig::guard_eps)
                   .add("scale", &RouterConfig::scale)
                   .add("select_on", &RouterConfig::select_on)
                   .add("num_groups", &RouterConfig::num_groups)
                   .add("groups_used", &RouterConfig::groups_used)
                   .add("group_reduce", &RouterConfig::group_reduce)
                   .add("group_mask", &RouterConfig::group_mask)
                   .add("weight_on", &RouterConfig::weight_on)
                   .add("identity_experts", &RouterConfig::identity_experts)
                   .add("router_bias", &RouterConfig::router_bias)
                   .add("selection_bias", &RouterConfig::selection_bias),
               constructed<RouterConfig>());
}

}  // namespace moesaic::python
