/// Layers made of others: replace, select_experts, permute_experts.

#include <pybind11/stl.h>

#include "calls.hpp"
#include "expert_ids.hpp"
#include "layer_parts.hpp"
#include "moesaic/edit.hpp"

namespace moesaic::python {
namespace {

/// A role of `after` that lost its bias, or a scale that the same encoded matrices had, is a part
/// that got lost on the way, unless the caller says otherwise.
void check_nothing_dropped(const ExpertStack& before, const ExpertStack& after, bool drop_biases,
                           bool drop_scales) {
  constexpr const char* kOperation = "MoeLayer.replace";
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    const RoleWeights& from = before.role(role);
    const RoleWeights& to = after.role(role);
    if (!to.ref) continue;
    require<ConfigError>(drop_biases || from.bias == nullptr || to.bias != nullptr, [&] {
      return Problem{kOperation, std::string(name_of(role)) + " bias", "one, as the layer has",
                     "a stack without",
                     "give the stack biases=layer.stack.biases, or drop_biases=True"};
    });
    const bool encoded = to.ref.type == from.ref.type && traits(to.ref.type).block_elems > 1;
    require<ConfigError>(
        drop_scales || !encoded || from.scale == nullptr || to.scale != nullptr, [&] {
          return Problem{kOperation, std::string(name_of(role)) + " scale", "one, as the layer has",
                         "a stack without",
                         "give the stack scales=layer.stack.scales, or drop_scales=True"};
        });
  }
}

/// The arguments of the constructor that make this layer.
py::dict arguments_of(const py::object& layer) {
  py::dict all;
  for (const char* name :
       {"stack", "config", "router_weight", "shared", "latent", "token_experts", "precision"}) {
    all[name] = layer.attr(name);
  }
  all.attr("update")(layer.attr("norms"));
  return all;
}

py::object replace_parts(const LayerObject& object, bool drop_biases, bool drop_scales,
                         const py::kwargs& changes) {
  const auto layer = object.get("MoeLayer.replace");
  const py::object self = py::cast(object, py::return_value_policy::reference);
  require<UnsupportedError>(layer->parts().residency == nullptr, [] {
    return Problem{"MoeLayer.replace", "layer", "experts that are all in fast memory",
                   "experts of a store", "make the layer anew from the store"};
  });
  py::dict all = arguments_of(self);
  if (changes.contains("shared_gate") && !changes.contains("shared") &&
      layer->shared() != nullptr) {
    // A gate alone changes that of the experts that are there.
    const py::object shared = self.attr("shared");
    all["shared"] = py::type::of(shared)(shared.attr("stack"), changes["shared_gate"],
                                         py::arg("scale") = shared.attr("scale"));
    changes.attr("pop")("shared_gate");
  }
  all.attr("update")(changes);
  const py::object stack = all["stack"];
  if (py::isinstance<ExpertStack>(stack)) {
    const auto& after = stack.cast<const ExpertStack&>();
    const std::int32_t experts = layer->config().num_experts;
    require<ShapeError>(changes.contains("config") || after.num_experts() == experts, [&] {
      return Problem{"MoeLayer.replace", "stack",
                     std::to_string(experts) + " experts, as the layer has",
                     std::to_string(after.num_experts()),
                     "select_experts takes the router along, or give config= too"};
    });
    check_nothing_dropped(layer->stack(), after, drop_biases, drop_scales);
  }
  return py::type::of(self)(**all);
}

LayerObject select_of_layer(const LayerObject& self, const py::object& ids) {
  constexpr const char* kOperation = "MoeLayer.select_experts";
  const auto layer = self.get(kOperation);
  const auto experts = import_expert_ids(ids, kOperation, "ids");
  check_experts(experts, layer->config().num_experts, kOperation);
  return {std::make_shared<const MoeLayer>(select_experts(*layer, experts)), self.precision()};
}

LayerObject permute_layer(const LayerObject& self, const py::object& order) {
  constexpr const char* kOperation = "MoeLayer.permute_experts";
  const auto layer = self.get(kOperation);
  const auto experts = import_expert_ids(order, kOperation, "order");
  check_permutation(experts, layer->config().num_experts, kOperation);
  return {std::make_shared<const MoeLayer>(select_experts(*layer, experts)), self.precision()};
}

}  // namespace

void define_layer_edits(LayerClass& type) {
  type.def("replace", &replace_parts, py::kw_only(), py::arg("drop_biases") = false,
           py::arg("drop_scales") = false)
      .def("select_experts", &select_of_layer, py::arg("ids"))
      .def("permute_experts", &permute_layer, py::arg("order"));
}

}  // namespace moesaic::python
