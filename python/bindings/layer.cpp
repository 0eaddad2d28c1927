#include "layer.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calls.hpp"
#include "forward.hpp"
#include "gguf.hpp"
#include "gil.hpp"
#include "layer_parts.hpp"
#include "load.hpp"
#include "pickling.hpp"

namespace moesaic::python {

std::shared_ptr<const MoeLayer> LayerObject::get(const char* operation) const {
  require<DeviceError>(layer_ != nullptr, [&] {
    return Problem{operation, "layer", "an open layer", "a closed one", {}};
  });
  return layer_;
}

namespace {

constexpr const char* kMoeLayer = "MoeLayer";

LayerObject layer_from_gguf(const py::object& source, std::int32_t layer,
                            const std::optional<MoeConfig>& config,
                            std::optional<std::int32_t> top_k, const py::object& experts,
                            const std::string& device, const std::string& layout,
                            const std::string& precision, const py::object& weight_cache,
                            const py::object& progress) {
  constexpr const char* kOperation = "MoeLayer.from_gguf";
  const auto file = gguf_file(source, kOperation);
  const auto default_precision = parse_precision(precision, kOperation);
  std::optional<MoeConfig> own = config;
  if (top_k)
    own = with_top_k(config ? *config : MoeConfig::from_gguf(*file, layer), *top_k, kOperation);
  Loading loading(kOperation, device, layout, std::nullopt, progress);
  const auto kept = loading.keep(experts, kOperation);
  const py::object cache = loading.keep_panels(weight_cache, *file, kOperation);
  auto loaded = loading.run([&](const LoadOptions& options) {
    return std::make_shared<const MoeLayer>(
        own ? MoeLayer::from_gguf_with_config(file, layer, *own, options)
            : MoeLayer::from_gguf(file, layer, options));
  });
  log_report(kOperation, loaded->stack().report());
  const py::dict options(py::arg("config") = config, py::arg("top_k") = top_k,
                         py::arg("experts") = kept, py::arg("device") = device,
                         py::arg("layout") = layout, py::arg("precision") = precision,
                         py::arg("weight_cache") = cache);
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
  const auto usage = self.usage();
  ForwardRequest request{kMoeLayer, LayerRef(*layer), layer->config().top_k, x};
  request.layer.usage = usage.get();
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

/// Files are written in Python.
void save_layer(const py::object& layer, const py::object& path, const py::object& metadata,
                const py::object& architecture, bool fused, bool overwrite,
                const py::object& progress) {
  py::dict options;
  options["operation"] = "MoeLayer.save";
  options["metadata"] = metadata;
  options["architecture"] = architecture;
  options["fused"] = fused;
  options["overwrite"] = overwrite;
  options["progress"] = progress;
  call_python(py::module_::import("moesaic.saving.layers").attr("write_layers"),
              py::make_tuple(path, layer), options);
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
  std::int64_t epilogues = 0;
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    const RoleWeights& weights = layer->stack().role(role);
    if (weights.bias != nullptr) epilogues += bytes_of(*weights.bias);
    if (weights.scale != nullptr) epilogues += bytes_of(*weights.scale);
  }
  add("other", epilogues + bytes_of(parts.input_norm.weight) + bytes_of(parts.router_norm.weight) +
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

MoeConfig with_top_k(MoeConfig config, std::int32_t top_k, const char* operation) {
  require<ConfigError>(config.vocab_size == 0 || top_k == config.top_k, [&] {
    return Problem{operation,
                   "top_k",
                   std::to_string(config.top_k) + ", as many as its table of experts by token has",
                   std::to_string(top_k),
                   {}};
  });
  config.top_k = config.router.top_k = top_k;
  config.router.validate();
  return config;
}

void remember_layer(const std::shared_ptr<const MoeLayer>& layer, const py::object& reduced_layer) {
  remember_origin(layer, reduced_layer);
  remember_origin(layer->stack_ptr(), reduced("stack_of", reduced_layer));
}

void bind_layer(py::module_& m) {
  LayerClass type(m, "MoeLayer", py::is_final());
  reduce_by(type, [](py::handle self) {
    return origin_of(self.cast<const LayerObject&>().get("pickle"), "MoeLayer");
  });
  define_layer_parts(type);
  define_layer_edits(type);
  define_layer_calls(type);
  type.def_static("from_gguf", &layer_from_gguf, py::arg("file"), py::arg("layer"), py::kw_only(),
                  py::arg("config") = py::none(), py::arg("top_k") = py::none(),
                  py::arg("experts") = py::none(), py::arg("device") = "cpu",
                  py::arg("layout") = "auto", py::arg("precision") = "auto",
                  py::arg("weight_cache") = false, py::arg("progress") = py::none())
      .def("__call__", &call_layer, py::arg("x"), py::arg("router_logits") = py::none(),
           py::kw_only(), py::arg("routing") = py::none(), py::arg("topk_ids") = py::none(),
           py::arg("token_ids") = py::none(), py::arg("router_input") = py::none(),
           py::arg("return_routing") = false, py::arg("out") = py::none(),
           py::arg("workspace") = py::none(), py::arg("accumulate") = false,
           py::arg("precision") = py::none(), py::arg("stream") = py::none())
      .def_property_readonly("report",
                             [](const LayerObject& l) {
                               return LoadReport(l.get("MoeLayer.report")->stack().report());
                             })
      .def("memory", &memory)
      .def("save", &save_layer, py::arg("path"), py::kw_only(), py::arg("metadata") = py::none(),
           py::arg("architecture") = py::none(), py::arg("fused") = false,
           py::arg("overwrite") = false, py::arg("progress") = py::none())
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
