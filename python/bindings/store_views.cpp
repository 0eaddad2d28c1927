/// LayerMoeWeights and ExpertRole: the experts of a store, seen without a copy.

#include "store_views.hpp"

#include "arrays.hpp"

namespace moesaic::python {
namespace {

/// Bytes of the store as numpy sees them: f32 [k, n] of one expert or [E, k, n] of all, or encoded
/// bytes. The store keeps [n, k], so that the view of f32 is a transposed one.
py::array view_array(const StoreRole& role, std::span<const std::byte> bytes, bool one) {
  const RoleView& view = role.view;
  if (view.ref().type != QuantType::F32) {
    const auto size = static_cast<std::int64_t>(bytes.size());
    return numpy_view(DType::U8, {size}, bytes.data(), role.store);
  }
  if (one) {
    return numpy_view(DType::F32, {view.n(), view.k()}, bytes.data(), role.store).attr("T");
  }
  return numpy_view(DType::F32, {view.num_experts(), view.n(), view.k()}, bytes.data(), role.store)
      .attr("swapaxes")(1, 2);
}

}  // namespace

void bind_store_views(py::module_& m) {
  py::class_<StoreRole>(m, "ExpertRole", py::is_final())
      .def_property_readonly("num_experts", [](const StoreRole& r) { return r.view.num_experts(); })
      .def_property_readonly("k", [](const StoreRole& r) { return r.view.k(); })
      .def_property_readonly("n", [](const StoreRole& r) { return r.view.n(); })
      .def_property_readonly(
          "quant", [](const StoreRole& r) { return std::string(traits(r.view.ref().type).name); })
      .def_property_readonly("expert_stride",
                             [](const StoreRole& r) { return r.view.expert_stride(); })
      .def(
          "expert_slice",
          [](const StoreRole& r, std::int32_t expert) {
            return view_array(r, r.view.expert_slice(expert), true);
          },
          py::arg("expert"))
      .def("as_slice", [](const StoreRole& r) { return view_array(r, r.view.as_slice(), false); })
      .def_property_readonly("scale",
                             [](const StoreRole& r) -> py::object {
                               const auto& scale = r.weights->scale;
                               if (scale == nullptr) return py::none();
                               return numpy_view(DType::F32, {r.view.num_experts()}, scale->data(),
                                                 scale);
                             })
      .def("__repr__", [](const StoreRole& r) {
        return "moesaic.ExpertRole(num_experts=" + std::to_string(r.view.num_experts()) +
               ", k=" + std::to_string(r.view.k()) + ", n=" + std::to_string(r.view.n()) + ")";
      });

  const auto role = [](const StoreLayer& l, const RoleView& view, Role which) -> py::object {
    if (!view) return py::none();
    return py::cast(StoreRole{l.store, view, &l.weights->stack->role(which)});
  };
  py::class_<StoreLayer>(m, "LayerMoeWeights", py::is_final())
      .def_property_readonly("layer_index",
                             [](const StoreLayer& l) { return l.weights->layer_index; })
      .def_property_readonly(
          "gate", [role](const StoreLayer& l) { return role(l, l.weights->gate, Role::Gate); })
      .def_property_readonly(
          "up", [role](const StoreLayer& l) { return role(l, l.weights->up, Role::Up); })
      .def_property_readonly(
          "down", [role](const StoreLayer& l) { return role(l, l.weights->down, Role::Down); })
      .def_property_readonly("expert_bytes",
                             [](const StoreLayer& l) { return l.weights->expert_bytes; })
      .def_property_readonly("stack",
                             [](const StoreLayer& l) {
                               return std::const_pointer_cast<ExpertStack>(l.weights->stack);
                             })
      .def("__repr__", [](const StoreLayer& l) {
        return "moesaic.LayerMoeWeights(layer_index=" + std::to_string(l.weights->layer_index) +
               ", expert_bytes=" + std::to_string(l.weights->expert_bytes) + ")";
      });
}

}  // namespace moesaic::python
