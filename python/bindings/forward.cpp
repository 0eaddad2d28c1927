/// The free forwards: loose parts, or a layer, with the path chosen or named.

#include "forward.hpp"

#include <pybind11/stl.h>

#include "config.hpp"
#include "layer.hpp"

namespace moesaic::python {
namespace {

/// What the `stack` argument of a forward stands for, kept alive for the call.
struct Model {
  std::shared_ptr<const ExpertStack> stack;
  std::shared_ptr<const MoeLayer> layer;
  std::shared_ptr<UsageCounter> usage;
  RouterConfig router;
  LayerRef ref;
  std::int32_t top_k = 0;
  std::optional<Precision> precision;
};

/// The router arguments of a call.
struct RouterArguments {
  std::optional<std::int32_t> top_k;
  std::optional<bool> renormalize;
  std::optional<RouterConfig> router;
  bool any() const { return top_k || renormalize || router; }
};

/// Throws DTypeError for a routing where logits belong, before anything asks for a router.
void refuse_routing(const py::object& logits, const char* operation) {
  require<DTypeError>(!py::isinstance<RoutingObject>(logits), [&] {
    return Problem{operation, "logits", "an array or None", "a Routing",
                   "give it by name: routing=..."};
  });
}

void fill_model(Model& model, const py::object& stack, const RouterArguments& arguments,
                const RoutingObject* routing, const py::object& activation, const char* operation) {
  if (py::isinstance<LayerObject>(stack)) {
    const auto& object = stack.cast<const LayerObject&>();
    require<ConfigError>(!arguments.any() && activation.is_none(), [&] {
      return Problem{operation, "router", "the layer's own router and activation",
                     "top_k, renormalize, router or activation", "pass layer.stack instead"};
    });
    model.layer = object.get(operation);
    model.precision = object.precision();
    model.usage = object.usage();
    model.ref = LayerRef(*model.layer);
    model.ref.usage = model.usage.get();
    model.top_k = model.layer->config().top_k;
    return;
  }
  require<DTypeError>(py::isinstance<ExpertStack>(stack), [&] {
    return Problem{operation, "stack", "an ExpertStack or MoeLayer", type_name(stack), {}};
  });
  model.stack = stack.cast<std::shared_ptr<ExpertStack>>();
  model.ref.stack = model.stack.get();
  if (!activation.is_none()) model.ref.activation = parse_activation(activation, operation);
  if (routing != nullptr) {
    require<ConfigError>(!arguments.any(), [&] {
      return Problem{operation, "routing", "a routing alone", "router arguments beside it", {}};
    });
    model.top_k = routing->value->top_k();
    return;
  }
  model.router = call_router(arguments.router, arguments.top_k, arguments.renormalize,
                             model.stack->num_experts(), operation);
  model.ref.router = &model.router;
  model.top_k = model.router.top_k;
}

ForwardRequest make_request(const char* operation, const Model& model, const py::object& x,
                            const py::object& out, Workspace* workspace, bool accumulate,
                            const std::optional<std::string>& precision, const py::object& stream) {
  ForwardRequest request{operation, model.ref, model.top_k, x};
  request.out = out;
  request.workspace = workspace;
  request.accumulate = accumulate;
  request.precision = precision ? parse_precision(precision, operation) : model.precision;
  request.stream = stream;
  return request;
}

py::object forward(const py::object& x, const py::object& logits, const py::object& stack,
                   std::optional<std::int32_t> top_k, std::optional<bool> renormalize,
                   const std::optional<RouterConfig>& router, const RoutingObject* routing,
                   const py::object& activation, const py::object& out, Workspace* workspace,
                   bool accumulate, const std::optional<std::string>& precision,
                   const py::object& stream) {
  constexpr const char* kOperation = "moe_forward";
  refuse_routing(logits, kOperation);
  Model model;
  fill_model(model, stack, {top_k, renormalize, router}, routing, activation, kOperation);
  ForwardRequest request =
      make_request(kOperation, model, x, out, workspace, accumulate, precision, stream);
  request.logits = logits;
  request.routing = routing;
  return run_forward(request, [](Context& context, const LayerRef& layer, const ForwardIo& io,
                                 Workspace& scratch) { moe_forward(context, layer, io, scratch); });
}

py::object forward_bucketed(const py::object& x, const py::object& logits, const py::object& stack,
                            std::optional<std::int32_t> top_k, std::optional<bool> renormalize,
                            const std::optional<RouterConfig>& router, const RoutingObject* routing,
                            const py::object& activation, const std::string& gemm,
                            const std::string& row_space, const py::object& out,
                            Workspace* workspace, bool accumulate,
                            const std::optional<std::string>& precision, const py::object& stream) {
  constexpr const char* kOperation = "moe_forward_bucketed";
  refuse_routing(logits, kOperation);
  const auto gemm_mode = parse_name<GemmMode>(gemm, kOperation, "gemm");
  const auto space = parse_name<RowSpaceMode>(row_space, kOperation, "row_space");
  Model model;
  fill_model(model, stack, {top_k, renormalize, router}, routing, activation, kOperation);
  ForwardRequest request =
      make_request(kOperation, model, x, out, workspace, accumulate, precision, stream);
  request.logits = logits;
  request.routing = routing;
  return run_forward(request, [&](Context& context, const LayerRef& layer, const ForwardIo& io,
                                  Workspace& scratch) {
    moe_forward_bucketed(context, layer, io, scratch, gemm_mode, space);
  });
}

py::object forward_cpu(const py::object& x, const RoutingObject& routing, const py::object& stack,
                       const py::object& activation, const py::object& out, Workspace* workspace,
                       bool accumulate, const std::optional<std::string>& precision,
                       const py::object& stream) {
  constexpr const char* kOperation = "moe_forward_cpu";
  Model model;
  fill_model(model, stack, {}, &routing, activation, kOperation);
  ForwardRequest request =
      make_request(kOperation, model, x, out, workspace, accumulate, precision, stream);
  request.routing = &routing;
  request.needs_workspace = false;
  return run_forward(request, [](Context&, const LayerRef& layer, const ForwardIo& io, Workspace&) {
    moe_forward_cpu(layer, io);
  });
}

}  // namespace

void bind_forward(py::module_& m) {
  m.def("moe_forward", &forward, py::arg("x"), py::arg("logits"), py::arg("stack"), py::kw_only(),
        py::arg("top_k") = py::none(), py::arg("renormalize") = py::none(),
        py::arg("router") = py::none(), py::arg("routing") = py::none(),
        py::arg("activation") = py::none(), py::arg("out") = py::none(),
        py::arg("workspace") = py::none(), py::arg("accumulate") = false,
        py::arg("precision") = py::none(), py::arg("stream") = py::none());
  m.def("moe_forward_bucketed", &forward_bucketed, py::arg("x"), py::arg("logits"),
        py::arg("stack"), py::kw_only(), py::arg("top_k") = py::none(),
        py::arg("renormalize") = py::none(), py::arg("router") = py::none(),
        py::arg("routing") = py::none(), py::arg("activation") = py::none(),
        py::arg("gemm") = "auto", py::arg("row_space") = "auto", py::arg("out") = py::none(),
        py::arg("workspace") = py::none(), py::arg("accumulate") = false,
        py::arg("precision") = py::none(), py::arg("stream") = py::none());
  m.def("moe_forward_cpu", &forward_cpu, py::arg("x"), py::arg("routing"), py::arg("stack"),
        py::kw_only(), py::arg("activation") = py::none(), py::arg("out") = py::none(),
        py::arg("workspace") = py::none(), py::arg("accumulate") = false,
        py::arg("precision") = py::none(), py::arg("stream") = py::none());
}

}  // namespace moesaic::python
