#pragma once

#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "calls.hpp"
#include "moesaic/error.hpp"
#include "moesaic/forward.hpp"
#include "routing.hpp"

namespace moesaic::python {

/// The arguments that every forward takes, as Python gave them.
struct ForwardRequest {
  const char* operation;
  LayerRef layer;
  std::int32_t top_k;
  py::object x;
  py::object logits = py::none();
  const RoutingObject* routing = nullptr;
  bool return_routing = false;
  py::object out = py::none();
  Workspace* workspace = nullptr;
  bool accumulate = false;
  std::optional<Precision> precision{};
  py::object stream = py::none();
  bool needs_workspace = true;
};

/// Imports, checks what only Python has (kinds of arrays, out=), calls run(context, layer, io,
/// workspace) without the GIL, and returns y or (y, Routing).
template <class Run>
py::object run_forward(const ForwardRequest& request, Run&& run) {
  const char* operation = request.operation;
  const ArrayRef x = import_array(request.x, operation, "x");
  const std::int64_t hidden = request.layer.stack->shape().hidden_size;
  require<ShapeError>(x.view.rank == 2 && x.view.dim(1) == hidden, [&] {
    return Problem{operation, "x", "[T, " + std::to_string(hidden) + "]", describe(x.read()), {}};
  });
  require<DTypeError>(
      x.view.dtype == DType::F32 || x.view.dtype == DType::F16 || x.view.dtype == DType::BF16,
      [&] { return Problem{operation, "x", "f32, f16 or bf16", name_of(x.view.dtype), {}}; });
  require<ConfigError>(request.logits.is_none() || request.routing == nullptr, [&] {
    return Problem{operation, "routing", "logits or a routing", "both", {}};
  });
  require<ConfigError>(!request.accumulate || !request.out.is_none(), [&] {
    return Problem{operation, "accumulate", "an out= to add to", "none", {}};
  });
  require<DeviceError>(request.stream.is_none(), [&] {
    return Problem{operation, "stream", "None on the cpu", type_name(request.stream), {}};
  });
  ArrayRef logits;
  ForwardIo io;
  io.x = x.read();
  if (!request.logits.is_none()) {
    logits = import_array(request.logits, operation, "router_logits");
    io.logits = logits.read();
  }
  std::shared_ptr<Routing> held;  // another thread may give the object a new value meanwhile
  if (request.routing != nullptr) {
    held = request.routing->value;
    io.routing = held->view();
  }
  RoutingObject routed;
  const std::int32_t top_k = held ? held->top_k() : request.top_k;
  if (request.return_routing) {
    routed.resized(x.view.dim(0), top_k);
    io.routing_out = routed.view();
  }
  Result result(request.x, x, x.view.dtype, {x.view.dim(0), hidden}, request.out, operation, true);
  io.out = result.view();
  io.accumulate = request.accumulate;
  require_disjoint(io.out, io.x, operation, "x");
  require_disjoint(io.out, io.logits, operation, "router_logits");
  Call call(request.precision);
  {
    const py::gil_scoped_release release;
    const CallWorkspace workspace(request.workspace, [&]() -> std::size_t {
      if (!request.needs_workspace) return 0;
      return workspace_bytes(call.context, request.layer, top_k, x.view.dim(0));
    });
    run(call.context, request.layer, io, *workspace);
  }
  py::object y = result.finish();
  if (!request.return_routing) return y;
  return py::make_tuple(std::move(y), py::cast(std::move(routed)));
}

}  // namespace moesaic::python
