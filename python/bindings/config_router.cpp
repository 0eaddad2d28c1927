#include "config.hpp"
#include "config_fields.hpp"

namespace moesaic::python {
namespace {

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

}  // namespace

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
  define_fields(router, "RouterConfig", &to_dict,
                {"num_experts", "top_k", "score", "renormalize", "guard", "guard_eps", "scale",
                 "select_on", "num_groups", "groups_used", "group_reduce", "group_mask",
                 "weight_on", "identity_experts", "router_bias", "selection_bias"});
}

}  // namespace moesaic::python
