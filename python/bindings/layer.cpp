#include "layer.hpp"

#include <pybind11/stl.h>

#include "arrays.hpp"
#include "calls.hpp"
#include "forward.hpp"
#include "load.hpp"
#include "moesaic/gguf.hpp"
#include "words.hpp"

namespace moesaic::python {

std::shared_ptr<const MoeLayer> LayerObject::get(const char* operation) const {
  require<DeviceError>(layer_ != nullptr, [&] {
    return Problem{operation, "layer", "an open layer", "a closed one", {}};
  });
  return layer_;
}

namespace {

using Stack = std::shared_ptr<ExpertStack>;

LayerObject make_layer(const Stack& stack, const MoeConfig& config, const py::object& router_weight,
                       const Stack& shared, const py::object& shared_gate,
                       const std::string& precision) {
  constexpr const char* kOperation = "MoeLayer";
  std::vector<float> router;
  if (!router_weight.is_none()) {
    const ArrayRef ref = import_array(router_weight, kOperation, "router_weight");
    require<ShapeError>(ref.view.rank == 2 && ref.view.dim(0) == config.num_experts &&
                            ref.view.dim(1) == config.hidden_size,
                        [&] {
                          return Problem{kOperation,
                                         "router_weight",
                                         "[" + std::to_string(config.num_experts) + ", " +
                                             std::to_string(config.hidden_size) + "]",
                                         describe(ref.read()),
                                         {}};
                        });
    router = import_floats(router_weight, kOperation, "router_weight");
  }
  std::optional<SharedExperts> shared_experts;
  if (shared) {
    shared_experts.emplace(SharedExperts{*shared, {}});
    if (!shared_gate.is_none())
      shared_experts->gate = import_floats(shared_gate, kOperation, "shared_gate");
  }
  return {
      std::make_shared<const MoeLayer>(config, stack, std::move(router), std::move(shared_experts)),
      parse_precision(precision, kOperation)};
}

LayerObject from_gguf(const std::shared_ptr<GgufFile>& file, std::int32_t layer,
                      const std::string& device, const std::string& layout,
                      const std::string& precision, const py::object& progress) {
  constexpr const char* kOperation = "MoeLayer.from_gguf";
  const auto default_precision = parse_precision(precision, kOperation);
  Loading loading(kOperation, device, layout, std::nullopt, progress);
  auto loaded = loading.run([&](const LoadOptions& options) {
    return std::make_shared<const MoeLayer>(MoeLayer::from_gguf(file, layer, options));
  });
  log_report(kOperation, loaded->stack().report());
  return {std::move(loaded), default_precision};
}

py::object call_layer(const LayerObject& self, const py::object& x, const py::object& router_logits,
                      const RoutingObject* routing, bool return_routing, const py::object& out,
                      Workspace* workspace, bool accumulate,
                      const std::optional<std::string>& precision, const py::object& stream) {
  constexpr const char* kOperation = "MoeLayer";
  const auto layer = self.get(kOperation);
  ForwardRequest request{kOperation, LayerRef(*layer), layer->config().top_k, x};
  request.logits = router_logits;
  request.routing = routing;
  request.return_routing = return_routing;
  request.out = out;
  request.workspace = workspace;
  request.accumulate = accumulate;
  request.precision = parse_precision(precision, kOperation);
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
  result["total"] = total;
  return result;
}

std::string repr(const LayerObject& self) {
  if (self.closed()) return "moesaic.MoeLayer(closed)";
  const auto layer = self.get("MoeLayer");
  const MoeConfig& c = layer->config();
  return "moesaic.MoeLayer(" + (c.architecture.empty() ? "" : c.architecture + ", ") +
         "layer=" + std::to_string(c.layer) + ", num_experts=" + std::to_string(c.num_experts) +
         ", top_k=" + std::to_string(c.top_k) + ", hidden_size=" + std::to_string(c.hidden_size) +
         ", intermediate_size=" + std::to_string(c.intermediate_size) + ", cpu, " +
         std::to_string(layer->stack().nbytes()) + " bytes)";
}

}  // namespace

void bind_layer(py::module_& m) {
  py::class_<LayerObject>(
      m, "MoeLayer", py::is_final(),
      "A whole MoE layer: router, experts and shared experts, as the model defines them.\n"
      "A context manager; calls from several threads at once are fine.")
      .def(py::init(&make_layer), py::arg("stack").none(false), py::arg("config"),
           py::arg("router_weight") = py::none(), py::kw_only(), py::arg("shared") = py::none(),
           py::arg("shared_gate") = py::none(), py::arg("precision") = "auto",
           "From parts. router_weight [E, H] (f32, f16 or bf16) or None: every call brings logits\n"
           "or a routing. shared: an ExpertStack of one expert, shared_gate [H] its sigmoid gate.\n"
           "Raises ShapeError when the parts disagree with the config.")
      .def_static(
          "from_gguf", &from_gguf, py::arg("file").none(false), py::arg("layer"), py::kw_only(),
          py::arg("device") = "cpu", py::arg("layout") = "auto", py::arg("precision") = "auto",
          py::arg("progress") = py::none(),
          "Everything from the file. device 'cpu'; layout 'auto' (fastest) or 'file' (the\n"
          "stored bytes, no copy); precision is the default of calls. progress(Progress) may\n"
          "return False to stop; progress=True shows a tqdm bar.\n\n"
          "Raises UnsupportedError, FormatError, ShapeError, DeviceError,\n"
          "OperationCancelled.")
      .def("__call__", &call_layer, py::arg("x"), py::arg("router_logits") = py::none(),
           py::kw_only(), py::arg("routing") = py::none(), py::arg("return_routing") = false,
           py::arg("out") = py::none(), py::arg("workspace") = py::none(),
           py::arg("accumulate") = false, py::arg("precision") = py::none(),
           py::arg("stream") = py::none(),
           "y [T, H] of x [T, H] (f32, f16 or bf16), in x's dtype and kind of array.\n\n"
           "Routed by the layer's own router, by router_logits f32 [T, E], or by a ready Routing.\n"
           "return_routing=True gives (y, Routing). out= is written (or, with accumulate=True, "
           "added\n"
           "to) and returned. workspace= is scratch of the caller. precision 'exact' | 'fast' "
           "beats\n"
           "the layer's and the tuning's. stream must be None on the cpu.\n\n"
           "Raises ShapeError, DTypeError, DeviceError, WorkspaceError, ConfigError; then nothing\n"
           "was written to out.")
      .def_property_readonly(
          "config", [](const LayerObject& l) { return l.get("MoeLayer.config")->config(); },
          "MoeConfig.")
      .def_property_readonly(
          "stack",
          [](const LayerObject& l) {
            return std::const_pointer_cast<ExpertStack>(l.get("MoeLayer.stack")->stack_ptr());
          },
          "ExpertStack.")
      .def_property_readonly(
          "report",
          [](const LayerObject& l) {
            return LoadReport(l.get("MoeLayer.report")->stack().report());
          },
          "LoadReport: what was kept, repacked or dequantised, and why.")
      .def_property_readonly(
          "precision",
          [](const LayerObject& l) { return word_of(l.precision().value_or(Precision::Auto)); },
          "Default of calls: auto | exact | fast.")
      .def_property_readonly(
          "router_weight",
          [](const LayerObject& l) -> py::object {
            const auto layer = l.get("MoeLayer.router_weight");
            if (layer->router_weight().empty()) return py::none();
            return numpy_view(DType::F32,
                              {layer->config().num_experts, layer->config().hidden_size},
                              layer->router_weight().data(), layer);
          },
          "f32 [E, H], read-only, or None.")
      .def("memory", &memory, "Bytes by part: gate, up, down, router, shared, total.")
      .def_property_readonly("closed", &LayerObject::closed, "Whether close() was called.")
      .def("close", &LayerObject::close,
           "Let go of the weights; calls under way finish first. Idempotent.")
      .def("__enter__", [](const py::object& self) { return self; })
      .def("__exit__", [](LayerObject& l, const py::args&) { l.close(); })
      .def("__repr__", &repr);
}

}  // namespace moesaic::python
