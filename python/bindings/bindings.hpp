#pragma once

/// What the files of this folder share. Each bind_* is a file's part of the module; module.cpp
/// calls them in this order, in which a class comes before those that name it.

#include <pybind11/pybind11.h>

namespace moesaic::python {

namespace py = pybind11;

void bind_errors(py::module_& m);
void bind_tuning(py::module_& m);
void bind_profile(py::module_& m);
void bind_array(py::module_& m);
void bind_asarray(py::module_& m);
void bind_results(py::module_& m);
void bind_quant(py::module_& m);
void bind_gguf(py::module_& m);
void bind_config(py::module_& m);
void bind_routing(py::module_& m);
void bind_plan(py::module_& m);
void bind_load(py::module_& m);
void bind_marlin_linear(py::module_& m);
void bind_marlin_stack(py::module_& m);
void bind_marlin_builder(py::module_& m);
void bind_expert_stack(py::module_& m);
void bind_shared_experts(py::module_& m);
void bind_quant_matrix(py::module_& m);
void bind_layer(py::module_& m);
void bind_refresh(py::module_& m);
void bind_pool_stats(py::module_& m);
void bind_expert_pool(py::module_& m);
void bind_placement(py::module_& m);
void bind_store_views(py::module_& m);
void bind_expert_store(py::module_& m);
void bind_checkpoint_store(py::module_& m);
void bind_layer_from_store(py::module_& m);
void bind_checkpoints(py::module_& m);
void bind_workspace(py::module_& m);
void bind_operations(py::module_& m);
void bind_forward(py::module_& m);
void bind_info(py::module_& m);
void bind_measure(py::module_& m);

}  // namespace moesaic::python
