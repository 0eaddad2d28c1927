#pragma once

/// The core's views as the plain structs of plugin.h.

#include "cuda/plugin.h"
#include "moesaic/backend.hpp"

namespace moesaic::cuda {

RowsArgs rows_args(const InputRows& rows);
/// Dense rows [count, cols].
RowsArgs dense_rows(const void* data, DType dtype, std::int64_t count, std::int64_t cols);
MapArgs map_args(const RowMap& map);
WeightArgs weight_args(const RoleWeights& role);
ActivationArgs activation_args(const Activation& activation);
/// Without logits, results and biases.
RouteArgs route_args(const RouterConfig& config);
/// Without rows and their type. `num_experts`: ids from here on are skipped.
CombineArgs combine_args(const CombineCall& call);

}  // namespace moesaic::cuda
