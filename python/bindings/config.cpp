#include "config.hpp"

namespace moesaic::python {

void bind_config(py::module_& m) {
  bind_activation(m);
  bind_router_config(m);
  bind_moe_config(m);
  bind_models(m);
}

}  // namespace moesaic::python
