/// A forward of a layer in three calls (route, expert_rows, finish), and the counts of its experts.

#include <pybind11/stl.h>

#include "forward.hpp"
#include "layer_parts.hpp"
#include "moesaic/offload.hpp"

namespace moesaic::python {
namespace {

/// A layer for the length of a call, and the request of it.
struct LayerCall {
  std::shared_ptr<const MoeLayer> layer;
  std::shared_ptr<UsageCounter> usage;
  ForwardRequest request;

  LayerCall(const LayerObject& self, const char* operation, const py::object& x,
            const std::optional<std::string>& precision, Workspace* workspace)
      : layer(self.get(operation)),
        usage(self.usage()),
        request{operation, LayerRef(*layer), layer->config().top_k, x} {
    request.layer.usage = usage.get();
    request.workspace = workspace;
    request.precision = precision ? parse_precision(precision, operation) : self.precision();
  }
};

py::object route_of_layer(const LayerObject& self, const py::object& x,
                          const py::object& router_logits, const py::object& topk_ids,
                          const py::object& token_ids, const py::object& router_input,
                          Workspace* workspace, const py::object& stream) {
  LayerCall call(self, "MoeLayer.route", x, {}, workspace);
  ForwardRequest& request = call.request;
  request.logits = router_logits;
  request.topk_ids = topk_ids;
  request.token_ids = token_ids;
  request.router_input = router_input;
  request.stream = stream;
  CallInputs inputs(request);
  const CallRouting routed = inputs.make_routing(request);
  inputs.run(request, [&](Workspace& scratch) {
    moe_route(inputs.call.context, request.layer, inputs.io, scratch);
  });
  return py::cast(routed.object());
}

py::object expert_rows(const LayerObject& self, const py::object& x, const RoutingObject& routing,
                       const py::object& out, Workspace* workspace,
                       const std::optional<std::string>& precision) {
  constexpr const char* kOperation = "MoeLayer.expert_rows";
  LayerCall call(self, kOperation, x, precision, workspace);
  ForwardRequest& request = call.request;
  const auto ids = host_routing(routing, kOperation);
  request.routing = &routing;
  CallInputs inputs(request);
  const ExpertStack& stack = call.layer->stack();
  Result rows(x, inputs.x, DType::F32,
              {count_expert_rows(request.layer, inputs.io.routing), stack.shape().hidden_size}, out,
              kOperation, false, inputs.target);
  TensorView written = rows.view();
  request.rows_out = &written;
  inputs.run(request, [&](Workspace& scratch) {
    moe_expert_rows(inputs.call.context, request.layer, inputs.io, written, scratch);
  });
  return rows.finish();
}

py::object finish_rows(const LayerObject& self, const py::object& rows,
                       const RoutingObject& routing, const py::object& x, const py::object& out,
                       Workspace* workspace, bool accumulate,
                       const std::optional<std::string>& precision) {
  constexpr const char* kOperation = "MoeLayer.finish";
  LayerCall call(self, kOperation, x, precision, workspace);
  ForwardRequest& request = call.request;
  const auto ids = host_routing(routing, kOperation);
  request.routing = &routing;
  request.out = out;
  request.accumulate = accumulate;
  const ArrayRef of_experts = import_array(rows, kOperation, "rows");
  ConstTensorView read = of_experts.read();
  request.rows_in = &read;
  return run_forward(request,
                     [&](Context& context, const LayerRef& layer, const ForwardIo& io,
                         Workspace& scratch) { moe_finish(context, layer, io, read, scratch); });
}

void count_usage(LayerObject& self, bool coactivation) {
  constexpr const char* kOperation = "MoeLayer.count_usage";
  const auto layer = self.get(kOperation);
  require<UnsupportedError>(layer->parts().residency == nullptr, [] {
    return Problem{kOperation, "layer", "one with all its experts in memory", "one of a store",
                   "its pool counts them already"};
  });
  const Device device = layer->stack().device();
  require<UnsupportedError>(device.type == DeviceType::Cpu, [&] {
    return Problem{kOperation, "layer", "one on the CPU", "one on " + to_string(device),
                   "count the ids that calls return"};
  });
  self.count_usage(std::make_shared<UsageCounter>(layer->config().num_experts, coactivation));
}

ExpertUsage usage_of(const LayerObject& self) {
  constexpr const char* kOperation = "MoeLayer.usage";
  const auto layer = self.get(kOperation);
  if (layer->parts().residency != nullptr) return layer->parts().residency->usage();
  require<ConfigError>(self.usage() != nullptr, [] {
    return Problem{kOperation, "usage", "a layer that counts", "one that does not",
                   "count_usage() begins to"};
  });
  return self.usage()->usage();
}

}  // namespace

void define_layer_calls(LayerClass& type) {
  type.def("route", &route_of_layer, py::arg("x"), py::arg("router_logits") = py::none(),
           py::kw_only(), py::arg("topk_ids") = py::none(), py::arg("token_ids") = py::none(),
           py::arg("router_input") = py::none(), py::arg("workspace") = py::none(),
           py::arg("stream") = py::none())
      .def("expert_rows", &expert_rows, py::arg("x"), py::arg("routing"), py::kw_only(),
           py::arg("out") = py::none(), py::arg("workspace") = py::none(),
           py::arg("precision") = py::none())
      .def("finish", &finish_rows, py::arg("rows"), py::arg("routing"), py::arg("x"), py::kw_only(),
           py::arg("out") = py::none(), py::arg("workspace") = py::none(),
           py::arg("accumulate") = false, py::arg("precision") = py::none())
      .def("count_usage", &count_usage, py::kw_only(), py::arg("coactivation") = false)
      .def_property_readonly("usage", &usage_of);
}

}  // namespace moesaic::python
