#include "layer_parts.hpp"

#include <pybind11/stl.h>

#include <utility>

#include "arrays.hpp"
#include "calls.hpp"
#include "load.hpp"
#include "values.hpp"

namespace moesaic::python {
namespace {

constexpr const char* kConstructor = "MoeLayer";

/// The values of an array as f32; empty for None. Throws ShapeError unless it has this shape.
std::vector<float> import_part(const py::object& value, const char* operation, const char* name,
                               const std::vector<std::int64_t>& shape) {
  if (value.is_none()) return {};
  const ConstTensorView view = import_array(value, operation, name).read();
  bool same = view.rank == static_cast<int>(shape.size());
  for (std::size_t i = 0; same && i < shape.size(); ++i)
    same = view.dim(static_cast<int>(i)) == shape[i];
  require<ShapeError>(
      same, [&] { return Problem{operation, name, shape_text(shape), describe(view), {}}; });
  return import_floats(value, operation, name);
}

/// Two projections (down [L, H], up [H, L]) as the stack of LatentExperts.
ExpertStack import_projections(const py::object& pair, const MoeConfig& config, Device device) {
  require<DTypeError>(py::isinstance<py::tuple>(pair) && py::len(pair) == 2, [&] {
    return Problem{
        kConstructor, "latent", "an ExpertStack or a tuple of two arrays", type_name(pair), {}};
  });
  const auto arrays = pair.cast<py::tuple>();
  const auto matrix = [](const py::object& value, const char* name, std::int64_t rows,
                         std::int64_t cols) {
    ArrayRef ref = import_array(value, kConstructor, name);
    const ConstTensorView view = ref.read();
    require<ShapeError>(view.rank == 2 && view.dim(0) == rows && view.dim(1) == cols, [&] {
      return Problem{kConstructor, name, shape_text({rows, cols}), describe(view), {}};
    });
    ref.view = TensorView(ref.view.data, view.dtype, {1, rows, cols}, view.device);
    ref.view.strides[1] = view.stride(0);
    ref.view.strides[2] = view.stride(1);
    return ref;
  };
  const std::int64_t hidden = config.hidden_size, latent = config.latent_size;
  const ArrayRef down = matrix(arrays[0], "latent[0]", latent, hidden);
  const ArrayRef up = matrix(arrays[1], "latent[1]", hidden, latent);
  Loading loading(kConstructor, to_string(device), "auto", std::nullopt, py::none());
  return loading.run([&](const LoadOptions& options) {
    return ExpertStack::from_dense_stacks({}, down.read(), up.read(), options);
  });
}

/// Latent experts from a stack or from two projections, with their norm; empty for None.
std::optional<LatentExperts> import_latent(const py::object& latent, const py::object& norm,
                                           const MoeConfig& config, Device device) {
  require<ConfigError>(!latent.is_none() || norm.is_none(), [] {
    return Problem{kConstructor, "latent", "the projections of latent_norm", "none", {}};
  });
  if (latent.is_none()) return std::nullopt;
  return LatentExperts{
      py::isinstance<ExpertStack>(latent) ? ExpertStack(latent.cast<const ExpertStack&>())
                                          : import_projections(latent, config, device),
      {import_part(norm, kConstructor, "latent_norm", {config.latent_size}), config.norm_eps}};
}

/// The experts of each token id, [vocab_size, top_k]; empty for None. Throws ShapeError.
std::vector<std::int32_t> import_table(const py::object& value, const MoeConfig& config) {
  if (value.is_none()) return {};
  const Ids ids = import_ids(value, kConstructor, "token_experts");
  require<ShapeError>(
      ids.view.rank == 2 && ids.view.dim(0) == config.vocab_size && ids.view.dim(1) == config.top_k,
      [&] {
        return Problem{kConstructor,
                       "token_experts",
                       shape_text({config.vocab_size, config.top_k}),
                       describe(ids.view),
                       {}};
      });
  const auto* data = static_cast<const std::int32_t*>(ids.view.data);
  return {data, data + ids.view.num_elements()};
}

LayerObject make_layer(const std::shared_ptr<ExpertStack>& stack, const MoeConfig& config,
                       const py::object& router_weight, const py::object& shared,
                       const py::object& shared_gate, const py::object& latent,
                       const py::object& latent_norm, const py::object& input_norm,
                       const py::object& router_norm, const py::object& token_experts,
                       const std::string& precision) {
  MoeLayer::Parts parts = import_parts(stack, config,
                                       {router_weight, shared, shared_gate, latent, latent_norm,
                                        input_norm, router_norm, token_experts});
  return {std::make_shared<const MoeLayer>(config, std::move(parts)),
          parse_precision(precision, kConstructor)};
}

using Layer = std::shared_ptr<const MoeLayer>;

/// A read-only array of a part of the layer, which it keeps; None for an empty one.
py::object view_part(const Layer& layer, const std::vector<float>& values,
                     const std::vector<std::int64_t>& shape) {
  if (values.empty()) return py::none();
  return numpy_view(DType::F32, shape, values.data(), layer);
}

/// A part of the layer as an object of its own, which keeps the layer; null for a part that is not
/// there. Classes of the module are read-only, so that a mutable pointer changes nothing.
template <class Part>
std::shared_ptr<Part> share_part(const Layer& layer, const Part* part) {
  if (part == nullptr) return nullptr;
  return {layer, const_cast<Part*>(part)};
}

py::object router_weight_of(const LayerObject& self) {
  const Layer layer = self.get("MoeLayer.router_weight");
  return view_part(layer, layer->router_weight(),
                   {layer->config().router.num_experts, layer->config().hidden_size});
}

std::shared_ptr<SharedExperts> shared_of(const LayerObject& self) {
  const Layer layer = self.get("MoeLayer.shared");
  return share_part(layer, layer->shared());
}

std::shared_ptr<ExpertStack> latent_of(const LayerObject& self) {
  const Layer layer = self.get("MoeLayer.latent");
  return share_part(layer, layer->latent() != nullptr ? &layer->latent()->projections : nullptr);
}

py::dict norms_of(const LayerObject& self) {
  const Layer layer = self.get("MoeLayer.norms");
  py::dict norms;
  const auto add = [&](const char* name, const RmsNorm& norm) {
    if (!norm) return;
    norms[name] = view_part(layer, norm.weight, {static_cast<std::int64_t>(norm.weight.size())});
  };
  if (layer->latent() != nullptr) add("latent_norm", layer->latent()->norm);
  add("input_norm", layer->parts().input_norm);
  add("router_norm", layer->parts().router_norm);
  return norms;
}

py::object token_experts_of(const LayerObject& self) {
  const Layer layer = self.get("MoeLayer.token_experts");
  const std::vector<std::int32_t>& table = layer->parts().token_experts;
  if (table.empty()) return py::none();
  return numpy_view(DType::I32, {layer->config().vocab_size, layer->config().top_k}, table.data(),
                    layer);
}

const char* precision_of(const LayerObject& self) {
  return name_of(self.precision().value_or(Precision::Auto));
}

}  // namespace

MoeLayer::Parts import_parts(std::shared_ptr<const ExpertStack> stack, const MoeConfig& config,
                             const LayerArguments& arguments) {
  const std::int64_t hidden = config.hidden_size;
  const auto norm = [&](const py::object& weight, const char* name) {
    return RmsNorm{import_part(weight, kConstructor, name, {hidden}), config.norm_eps};
  };
  MoeLayer::Parts parts;
  parts.router_weight = import_part(arguments.router_weight, kConstructor, "router_weight",
                                    {config.router.num_experts, hidden});
  parts.shared = import_shared(arguments.shared, arguments.shared_gate, hidden, kConstructor);
  parts.latent = import_latent(arguments.latent, arguments.latent_norm, config, stack->device());
  parts.input_norm = norm(arguments.input_norm, "input_norm");
  parts.router_norm = norm(arguments.router_norm, "router_norm");
  parts.token_experts = import_table(arguments.token_experts, config);
  parts.stack = std::move(stack);
  return parts;
}

std::optional<SharedExperts> import_shared(const py::object& shared, const py::object& gate,
                                           std::int64_t hidden, const char* operation) {
  require<ConfigError>(!shared.is_none() || gate.is_none(), [&] {
    return Problem{operation, "shared_gate", "none without shared experts", "some", {}};
  });
  if (shared.is_none()) return std::nullopt;
  if (py::isinstance<SharedExperts>(shared)) {
    require<ConfigError>(gate.is_none(), [&] {
      return Problem{
          operation, "shared_gate", "none beside a SharedExperts, which has its own", "some", {}};
    });
    return shared.cast<const SharedExperts&>();
  }
  require<DTypeError>(py::isinstance<ExpertStack>(shared), [&] {
    return Problem{operation, "shared", "a SharedExperts or an ExpertStack", type_name(shared), {}};
  });
  return SharedExperts{.stack = shared.cast<const ExpertStack&>(),
                       .gate = import_part(gate, operation, "shared_gate", {hidden})};
}

void bind_shared_experts(py::module_& m) {
  constexpr const char* kName = "SharedExperts";
  using Shared = std::shared_ptr<SharedExperts>;
  py::class_<SharedExperts, Shared>(m, kName, py::is_final())
      .def(py::init([](const ExpertStack& stack, const py::object& gate, float scale) {
             return std::make_shared<SharedExperts>(SharedExperts{
                 .stack = stack,
                 .gate = import_part(gate, kName, "gate", {stack.shape().hidden_size}),
                 .scale = scale});
           }),
           py::arg("stack"), py::arg("gate") = py::none(), py::kw_only(), py::arg("scale") = 1.0F)
      .def_property_readonly(
          "stack",
          [](const Shared& self) { return std::shared_ptr<ExpertStack>(self, &self->stack); })
      .def_property_readonly("gate",
                             [](const Shared& self) -> py::object {
                               if (self->gate.empty()) return py::none();
                               return numpy_view(DType::F32,
                                                 {static_cast<std::int64_t>(self->gate.size())},
                                                 self->gate.data(), self);
                             })
      .def_property_readonly("scale", [](const Shared& self) { return self->scale; })
      .def("__repr__", [](const SharedExperts& self) {
        return "moesaic.SharedExperts(intermediate_size=" +
               std::to_string(self.stack.shape().intermediate_size) +
               (self.gate.empty() ? "" : ", with a gate") + ")";
      });
}

void define_layer_parts(LayerClass& type) {
  type.def(py::init(&make_layer), py::arg("stack").none(false), py::arg("config"),
           py::arg("router_weight") = py::none(), py::kw_only(), py::arg("shared") = py::none(),
           py::arg("shared_gate") = py::none(), py::arg("latent") = py::none(),
           py::arg("latent_norm") = py::none(), py::arg("input_norm") = py::none(),
           py::arg("router_norm") = py::none(), py::arg("token_experts") = py::none(),
           py::arg("precision") = "auto")
      .def_property_readonly(
          "config", [](const LayerObject& l) { return l.get("MoeLayer.config")->config(); })
      .def_property_readonly(
          "stack",
          [](const LayerObject& l) {
            return std::const_pointer_cast<ExpertStack>(l.get("MoeLayer.stack")->stack_ptr());
          })
      .def_property_readonly("router_weight", &router_weight_of)
      .def_property_readonly("shared", &shared_of)
      .def_property_readonly("latent", &latent_of)
      .def_property_readonly("norms", &norms_of)
      .def_property_readonly("token_experts", &token_experts_of)
      .def_property_readonly("precision", &precision_of);
}

}  // namespace moesaic::python
