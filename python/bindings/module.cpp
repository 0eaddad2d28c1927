#include "bindings.hpp"

PYBIND11_MODULE(_core, m, pybind11::mod_gil_not_used()) {
  using namespace moesaic::python;
  m.doc() = "The compiled core of moesaic. Import names from moesaic instead.";
  // Classes first say where users find them.
  m.attr("__name__") = "moesaic";
  bind_errors(m);
  bind_tuning(m);
  bind_profile(m);
  bind_array(m);
  bind_quant(m);
  bind_gguf(m);
  bind_config(m);
  bind_routing(m);
  bind_plan(m);
  bind_load(m);
  bind_marlin(m);
  bind_expert_stack(m);
  bind_layer(m);
  bind_expert_pool(m);
  bind_offload(m);
  bind_checkpoints(m);
  bind_workspace(m);
  bind_operations(m);
  bind_forward(m);
  bind_info(m);
  bind_measure(m);
  m.attr("__name__") = "moesaic._core";
}
