#include "arguments.hpp"
#include "bindings.hpp"
#include "docs.hpp"
#include "seal.hpp"

// Wheels for another kind of machine are compiled with the Python headers of this one.
static_assert(sizeof(void*) == SIZEOF_VOID_P && sizeof(size_t) == SIZEOF_SIZE_T &&
                  sizeof(long) == SIZEOF_LONG && sizeof(wchar_t) == SIZEOF_WCHAR_T,
              "pyconfig.h is of another kind of machine");

// Free-threaded Python takes its lock for this module: what threads share in the objects of this
// folder is guarded by nothing else.
PYBIND11_MODULE(_core, m) {
  using namespace moesaic::python;
  // Classes take __module__ from this name: users find them in moesaic.
  m.attr("__name__") = "moesaic";
  bind_errors(m);
  bind_tuning(m);
  bind_profile(m);
  bind_array(m);
  bind_asarray(m);
  bind_results(m);
  bind_quant(m);
  bind_gguf(m);
  bind_config(m);
  bind_routing(m);
  bind_plan(m);
  bind_load(m);
  bind_marlin_linear(m);
  bind_marlin_stack(m);
  bind_marlin_builder(m);
  bind_expert_stack(m);
  bind_shared_experts(m);
  bind_quant_matrix(m);
  bind_layer(m);
  bind_refresh(m);
  bind_pool_stats(m);
  bind_expert_pool(m);
  bind_placement(m);
  bind_store_views(m);
  bind_expert_store(m);
  bind_checkpoint_store(m);
  bind_layer_from_store(m);
  bind_checkpoints(m);
  bind_workspace(m);
  bind_operations(m);
  bind_forward(m);
  bind_info(m);
  bind_measure(m);
  attach_docs(m);
  guard_calls(m);
  seal_classes(m);
  m.attr("__name__") = "moesaic._core";
}
