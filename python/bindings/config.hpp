#pragma once

#include <optional>

#include "bindings.hpp"
#include "moesaic/config.hpp"

namespace moesaic::python {

/// One part of bind_config each, in an order in which every class finds those it mentions.
void bind_activation(py::module_& m);
void bind_router_config(py::module_& m);
void bind_moe_config(py::module_& m);
void bind_models(py::module_& m);

/// An Activation, or its kind as text. Throws ConfigError.
Activation parse_activation(const py::object& value, const char* operation);

/// The router of a call: `router`, or softmax over `num_experts` with `top_k` and `renormalize`
/// (true when not given). Throws ConfigError when both or neither are given.
RouterConfig call_router(const std::optional<RouterConfig>& router,
                         std::optional<std::int32_t> top_k, std::optional<bool> renormalize,
                         std::int32_t num_experts, const char* operation);

}  // namespace moesaic::python
