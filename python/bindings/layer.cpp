#include "layer.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calls.hpp"
#include "forward.hpp"
#include "gguf.hpp"
#include "load.hpp"
#include "pickling.hpp"
#include "values.hpp"

namespace moesaic::python {

std::shared_ptr<const MoeLayer> LayerObject::get(const char* operation) const {
  require<DeviceError>(layer_ != nullptr, [&] {
    return Problem{operation, "layer", "an open layer", "a closed one", {}};
  });
  return layer_;
}

namespace {

using Stack = std::shared_ptr<ExpertStack>;

constexpr const char* kMoeLayer = "MoeLayer";

/// The values of an array as f32; empty for None. Throws ShapeError unless it has this shape.
std::vector<float> import_part(const py::object& value, const char* name,
                               const std::vector<std::int64_t>& shape) {
  if (value.is_none()) return {};
  const ArrayRef ref = import_array(value, kMoeLayer, name);
  bool same = ref.view.rank == static_cast<int>(shape.size());
  std::string expected;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    same = same && ref.view.dim(static_cast<int>(i)) == shape[i];
    expected += (i == 0 ? "[" : ", ") + std::to_string(shape[i]);
  }
  require<ShapeError>(
      same, [&] { return Problem{kMoeLayer, name, expected + "]", describe(ref.read()), {}}; });
  return import_floats(value, kMoeLayer, name);
}

/// The projections (down [L, H], up [H, L]) as the stack of LatentExperts; empty for None.
std::optional<LatentExperts> import_latent(const py::object& pair, const py::object& norm,
                                           const MoeConfig& config, Device device) {
  require<ConfigError>(!pair.is_none() || norm.is_none(), [] {
    return Problem{kMoeLayer, "latent", "the projections of latent_norm", "none", {}};
  });
  if (pair.is_none()) return std::nullopt;
  const auto arrays = py::cast<std::pair<py::object, py::object>>(pair);
  const auto matrix = [](const py::object& value, const char* name, std::int64_t rows,
                         std::int64_t cols) {
    ArrayRef ref = import_array(value, kMoeLayer, name);
    const ConstTensorView view = ref.read();
    require<ShapeError>(view.rank == 2 && view.dim(0) == rows && view.dim(1) == cols, [&] {
      return Problem{kMoeLayer,
                     name,
                     "[" + std::to_string(rows) + ", " + std::to_string(cols) + "]",
                     describe(view),
                     {}};
    });
    ref.view = TensorView(ref.view.data, view.dtype, {1, rows, cols}, view.device);
    ref.view.strides[1] = view.stride(0);
    ref.view.strides[2] = view.stride(1);
    return ref;
  };
  const std::int64_t hidden = config.hidden_size, latent = config.latent_size;
  const ArrayRef down = matrix(arrays.first, "latent[0]", latent, hidden);
  const ArrayRef up = matrix(arrays.second, "latent[1]", hidden, latent);
  Loading loading(kMoeLayer, to_string(device), "auto", std::nullopt, py::none());
  ExpertStack projections = loading.run([&](const LoadOptions& options) {
    return ExpertStack::from_dense_stacks({}, down.read(), up.read(), options);
  });
  return LatentExperts{std::move(projections),
                       {import_part(norm, "latent_norm", {latent}), config.norm_eps}};
}

/// The experts of each token id, [vocab_size, top_k]; empty for None. Throws ShapeError.
std::vector<std::int32_t> import_table(const py::object& value, const MoeConfig& config) {
  if (value.is_none()) return {};
  const Ids ids = import_ids(value, kMoeLayer, "token_experts");
  require<ShapeError>(
      ids.view.rank == 2 && ids.view.dim(0) == config.vocab_size && ids.view.dim(1) == config.top_k,
      [&] {
        return Problem{
            kMoeLayer,
            "token_experts",
            "[" + std::to_string(config.vocab_size) + ", " + std::to_string(config.top_k) + "]",
            describe(ids.view),
            {}};
      });
  const auto* data = static_cast<const std::int32_t*>(ids.view.data);
  return {data, data + ids.view.num_elements()};
}

LayerObject make_layer(const Stack& stack, const MoeConfig& config, const py::object& router_weight,
                       const Stack& shared, const py::object& shared_gate, const py::object& latent,
                       const py::object& latent_norm, const py::object& input_norm,
                       const py::object& router_norm, const py::object& token_experts,
                       const std::string& precision) {
  const std::int64_t hidden = config.hidden_size;
  MoeLayer::Parts parts;
  parts.stack = stack;
  parts.router_weight =
      import_part(router_weight, "router_weight", {config.router.num_experts, hidden});
  if (shared) {
    parts.shared.emplace(
        SharedExperts{.stack = *shared, .gate = import_part(shared_gate, "shared_gate", {hidden})});
  }
  parts.latent = import_latent(latent, latent_norm, config, stack->device());
  parts.input_norm = {import_part(input_norm, "input_norm", {hidden}), config.norm_eps};
  parts.router_norm = {import_part(router_norm, "router_norm", {hidden}), config.norm_eps};
  parts.token_experts = import_table(token_experts, config);
  return {std::make_shared<const MoeLayer>(config, std::move(parts)),
          parse_precision(precision, kMoeLayer)};
}

/// `config` with another number of experts per token.
MoeConfig with_top_k(MoeConfig config, std::int32_t top_k) {
  require<ConfigError>(config.vocab_size == 0 || top_k == config.top_k, [&] {
    return Problem{"MoeLayer.from_gguf",
                   "top_k",
                   std::to_string(config.top_k) + ", as many as its table of experts by token has",
                   std::to_string(top_k),
                   {}};
  });
  config.top_k = config.router.top_k = top_k;
  config.router.validate();
  return config;
}

LayerObject layer_from_gguf(const py::object& source, std::int32_t layer,
                            const std::optional<MoeConfig>& config,
                            std::optional<std::int32_t> top_k, const std::string& device,
                            const std::string& layout, const std::string& precision,
                            const py::object& progress) {
  constexpr const char* kOperation = "MoeLayer.from_gguf";
  const auto file = gguf_file(source, kOperation);
  const auto default_precision = parse_precision(precision, kOperation);
  std::optional<MoeConfig> own = config;
  if (top_k) own = with_top_k(config ? *config : MoeConfig::from_gguf(*file, layer), *top_k);
  Loading loading(kOperation, device, layout, std::nullopt, progress);
  auto loaded = loading.run([&](const LoadOptions& options) {
    return std::make_shared<const MoeLayer>(
        own ? MoeLayer::from_gguf_with_config(file, layer, *own, options)
            : MoeLayer::from_gguf(file, layer, options));
  });
  log_report(kOperation, loaded->stack().report());
  const py::dict options(py::arg("config") = config, py::arg("top_k") = top_k,
                         py::arg("device") = device, py::arg("layout") = layout,
                         py::arg("precision") = precision);
  remember_layer(loaded, reduced("gguf_layer", source_of(file), layer, options));
  return {std::move(loaded), default_precision};
}

py::object call_layer(const LayerObject& self, const py::object& x, const py::object& router_logits,
                      const RoutingObject* routing, const py::object& topk_ids,
                      const py::object& token_ids, const py::object& router_input,
                      bool return_routing, const py::object& out, Workspace* workspace,
                      bool accumulate, const std::optional<std::string>& precision,
                      const py::object& stream) {
  const auto layer = self.get(kMoeLayer);
  ForwardRequest request{kMoeLayer, LayerRef(*layer), layer->config().top_k, x};
  request.logits = router_logits;
  request.routing = routing;
  request.topk_ids = topk_ids;
  request.token_ids = token_ids;
  request.router_input = router_input;
  request.return_routing = return_routing;
  request.out = out;
  request.workspace = workspace;
  request.accumulate = accumulate;
  request.precision = parse_precision(precision, kMoeLayer);
  if (!precision) request.precision = self.precision();
  request.stream = stream;
  return run_forward(request, [](Context& context, const LayerRef& ref, const ForwardIo& io,
                                 Workspace& scratch) { moe_forward(context, ref, io, scratch); });
}

std::int64_t bytes_of(const std::vector<float>& values) {
  return static_cast<std::int64_t>(values.size() * sizeof(float));
}

py::dict memory(const LayerObject& self) {
  const auto layer = self.get("MoeLayer.memory");
  py::dict result;
  std::int64_t total = 0;
  const auto add = [&](const char* name, std::int64_t bytes) {
    result[name] = bytes;
    total += bytes;
  };
  for (const RoleReport& role : layer->stack().report().roles) add(name_of(role.role), role.bytes);
  add("router", bytes_of(layer->router_weight()));
  const SharedExperts* shared = layer->shared();
  add("shared", shared != nullptr ? shared->stack.nbytes() + bytes_of(shared->gate) : 0);
  const LatentExperts* latent = layer->latent();
  add("latent",
      latent != nullptr ? latent->projections.nbytes() + bytes_of(latent->norm.weight) : 0);
  const MoeLayer::Parts& parts = layer->parts();
  add("other", bytes_of(parts.input_norm.weight) + bytes_of(parts.router_norm.weight) +
                   static_cast<std::int64_t>(parts.token_experts.size() * sizeof(std::int32_t)));
  result["total"] = total;
  return result;
}

std::string layer_repr(const LayerObject& self) {
  if (self.closed()) return "moesaic.MoeLayer(closed)";
  const auto layer = self.get("MoeLayer");
  const MoeConfig& c = layer->config();
  return "moesaic.MoeLayer(" + (c.architecture.empty() ? "" : c.architecture + ", ") +
         "layer=" + std::to_string(c.layer) + ", num_experts=" + std::to_string(c.num_experts) +
         ", top_k=" + std::to_string(c.top_k) + ", hidden_size=" + std::to_string(c.hidden_size) +
         ", intermediate_size=" + std::to_string(c.intermediate_size) + ", " +
         to_string(layer->stack().device()) + ", " + std::to_string(layer->stack().nbytes()) +
         " bytes)";
}

}  // namespace

void remember_layer(const std::shared_ptr<const MoeLayer>& layer, const py::object& reduced_layer) {
  remember_origin(layer, reduced_layer);
  remember_origin(layer->stack_ptr(), reduced("stack_of", reduced_layer));
}

void bind_layer(py::module_& m) {
  py::class_<LayerObject> type(m, "MoeLayer", py::is_final());
  reduce_by(type, [](py::handle self) {
    return origin_of(self.cast<const LayerObject&>().get("pickle"), "MoeLayer");
  });
  type.def(py::init(&make_layer), py::arg("stack").none(false), py::arg("config"),
           py::arg("router_weight") = py::none(), py::kw_only(), py::arg("shared") = py::none(),
           py::arg("shared_gate") = py::none(), py::arg("latent") = py::none(),
           py::arg("latent_norm") = py::none(), py::arg("input_norm") = py::none(),
           py::arg("router_norm") = py::none(), py::arg("token_experts") = py::none(),
           py::arg("precision") = "auto")
      .def_static("from_gguf", &layer_from_gguf, py::arg("file"), py::arg("layer"), py::kw_only(),
                  py::arg("config") = py::none(), py::arg("top_k") = py::none(),
                  py::arg("device") = "cpu", py::arg("layout") = "auto",
                  py::arg("precision") = "auto", py::arg("progress") = py::none())
      .def("__call__", &call_layer, py::arg("x"), py::arg("router_logits") = py::none(),
           py::kw_only(), py::arg("routing") = py::none(), py::arg("topk_ids") = py::none(),
           py::arg("token_ids") = py::none(), py::arg("router_input") = py::none(),
           py::arg("return_routing") = false, py::arg("out") = py::none(),
           py::arg("workspace") = py::none(), py::arg("accumulate") = false,
           py::arg("precision") = py::none(), py::arg("stream") = py::none())
      .def_property_readonly(
          "config", [](const LayerObject& l) { return l.get("MoeLayer.config")->config(); })
      .def_property_readonly(
          "stack",
          [](const LayerObject& l) {
            return std::const_pointer_cast<ExpertStack>(l.get("MoeLayer.stack")->stack_ptr());
          })
      .def_property_readonly("report",
                             [](const LayerObject& l) {
                               return LoadReport(l.get("MoeLayer.report")->stack().report());
                             })
      .def_property_readonly(
          "precision",
          [](const LayerObject& l) { return name_of(l.precision().value_or(Precision::Auto)); })
      .def_property_readonly(
          "router_weight",
          [](const LayerObject& l) -> py::object {
            const auto layer = l.get("MoeLayer.router_weight");
            if (layer->router_weight().empty()) return py::none();
            return numpy_view(DType::F32,
                              {layer->config().router.num_experts, layer->config().hidden_size},
                              layer->router_weight().data(), layer);
          })
      .def("memory", &memory)
      .def_property_readonly("closed", &LayerObject::closed)
      .def("close", &LayerObject::close)
      .def("__copy__", [](const LayerObject& l) { return LayerObject(l); })
      .def(
          "__deepcopy__", [](const LayerObject& l, const py::object&) { return LayerObject(l); },
          py::arg("memo"), py::pos_only())
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](LayerObject& l, const py::args&) { l.close(); })
      .def("__repr__", &layer_repr);
}

}  // namespace moesaic::python
