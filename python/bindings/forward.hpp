#pragma once

#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "calls.hpp"
#include "devices.hpp"
#include "forward/check_call.hpp"
#include "gil.hpp"
#include "host_arrays.hpp"
#include "moesaic/error.hpp"
#include "moesaic/forward.hpp"
#include "result.hpp"
#include "routing.hpp"
#include "values.hpp"

namespace moesaic::python {

/// The arguments that every forward takes, as Python gave them.
struct ForwardRequest {
  const char* operation;
  LayerRef layer;
  std::int32_t top_k;
  py::object x;
  py::object logits = py::none();
  const RoutingObject* routing = nullptr;
  py::object topk_ids = py::none();
  py::object token_ids = py::none();
  py::object router_input = py::none();
  bool return_routing = false;
  py::object out = py::none();
  Workspace* workspace = nullptr;
  bool accumulate = false;
  std::optional<Precision> precision{};
  py::object stream = py::none();
  bool needs_workspace = true;
  /// Rows of pairs that the call reads or writes beside these: replaced by where its device finds them.
  ConstTensorView* rows_in = nullptr;
  TensorView* rows_out = nullptr;
};

/// [..., n] as the rows that the library takes. What has no more than two dimensions is the common
/// case, and costs nothing.
inline TensorView token_rows(ArrayRef& array, const char* operation, const char* name,
                             const DeviceStream& target) {
  if (array.view.rank <= 2) [[likely]]
    return array.view;
  return merged_in(array, array.view.rank - 1, operation, name, target);
}

/// The rarer inputs of a call, kept while it runs: ids without weights, token ids, router input.
class GivenInputs {
 public:
  GivenInputs(const ForwardRequest& request, const DeviceStream& target, ForwardIo& io) {
    const char* operation = request.operation;
    require<ConfigError>(request.topk_ids.is_none() || request.routing == nullptr, [&] {
      return Problem{operation, "topk_ids", "topk_ids or a routing", "both", {}};
    });
    if (!request.topk_ids.is_none()) {
      ids_ = import_ids(request.topk_ids, operation, "topk_ids", target);
      ids_.merge_first(ids_.view.rank - 1);
      require<ShapeError>(ids_.view.rank == 2 && ids_.view.dim(0) == io.x.dim(0) &&
                              ids_.view.dim(1) == request.top_k,
                          [&] {
                            return Problem{operation,
                                           "topk_ids",
                                           "[" + std::to_string(io.x.dim(0)) + ", " +
                                               std::to_string(request.top_k) + "]",
                                           describe(ids_.view),
                                           {}};
                          });
      // A view of a routing is made for writing too, but the forward only reads these ids.
      auto* data = const_cast<std::int32_t*>(static_cast<const std::int32_t*>(ids_.view.data));
      io.routing = {data, nullptr, ids_.view.dim(0), request.top_k};
    }
    if (!request.token_ids.is_none()) {
      tokens_ = import_ids(request.token_ids, operation, "token_ids", target);
      tokens_.merge_first(tokens_.view.rank);
      io.token_ids = tokens_.view;
    }
    if (!request.router_input.is_none()) {
      router_input_ = import_rows(request.router_input, operation, "router_input", target);
      io.router_input = token_rows(router_input_, operation, "router_input", target);
    }
  }
  GivenInputs(const GivenInputs&) = delete;
  GivenInputs& operator=(const GivenInputs&) = delete;

 private:
  Ids ids_, tokens_;
  ArrayRef router_input_;
};

/// The inputs of one call, imported, and kept while it runs.
struct CallInputs {
  explicit CallInputs(const ForwardRequest& request)
      : device(request.needs_workspace ? request.layer.stack->device() : Device{}),
        target(device_stream(device, request.stream, request.x, request.operation)),
        x(import_rows(request.x, request.operation, "x", target)),
        call(request.precision, device) {
    const char* operation = request.operation;
    io.x = token_rows(x, operation, "x", target);
    const bool as_it_came = io.x.rank == 2 && io.x.dim(1) == request.layer.hidden_size();
    forward::check_x(operation, target.device, request.layer, as_it_came ? io.x : x.read());
    if (!request.logits.is_none()) {
      logits_ = import_f32(request.logits, operation, "router_logits", target);
      io.logits = token_rows(logits_, operation, "router_logits", target);
    }
    call.context.set_stream(target.stream);
    if (request.routing != nullptr) {
      held_.emplace(*request.routing, target, request.x, call.context, operation);
      io.routing = held_->view();
    }
    given_.emplace(request, target, io);
    top_k = held_ ? held_->view().top_k : request.top_k;
  }
  CallInputs(const CallInputs&) = delete;
  CallInputs& operator=(const CallInputs&) = delete;

  /// Where the call leaves its routing.
  CallRouting make_routing(const ForwardRequest& request) {
    CallRouting routing(io.x.dim(0), top_k, target, request.x, request.operation);
    io.routing_out = routing.view();
    return routing;
  }

  /// Runs run(workspace) without the GIL, in the caller's workspace or one for this call, with the
  /// arrays of `io` where the device reaches them.
  template <class Run>
  void run(const ForwardRequest& request, Run&& run) {
    const InterruptibleRelease release;
    HostArrays arrays(call.context);
    if (arrays.needed()) place(arrays, request);
    const CallWorkspace workspace(request.workspace, call.context, [&]() -> std::size_t {
      if (!request.needs_workspace) return 0;
      return workspace_bytes(call.context, request.layer, top_k, io.x.dim(0));
    });
    run(*workspace);
    arrays.finish();
  }

  Device device;  ///< where the call runs: the reference on the host whatever it is given
  DeviceStream target;
  ArrayRef x;
  Call call;
  ForwardIo io;
  std::int32_t top_k = 0;

 private:
  void place(HostArrays& arrays, const ForwardRequest& request) {
    const auto place_routing = [&](RoutingView& routing, auto&& put) {
      const std::vector<std::int64_t> shape{routing.num_tokens, routing.top_k};
      if (routing.topk_ids != nullptr) {
        routing.topk_ids = static_cast<std::int32_t*>(
            const_cast<void*>(put(dense_view(routing.topk_ids, DType::I32, shape)).data));
      }
      if (routing.topk_weights != nullptr) {
        routing.topk_weights = static_cast<float*>(
            const_cast<void*>(put(dense_view(routing.topk_weights, DType::F32, shape)).data));
      }
    };
    for (ConstTensorView* const view : {&io.x, &io.logits, &io.router_input, &io.token_ids}) {
      if (view->data != nullptr) *view = arrays.read(*view);
    }
    place_routing(io.routing, [&](const TensorView& view) { return arrays.read(view); });
    place_routing(io.routing_out, [&](const TensorView& view) { return arrays.write(view); });
    if (io.out.data != nullptr) io.out = arrays.write(io.out);
    if (request.rows_in != nullptr) *request.rows_in = arrays.read(*request.rows_in);
    if (request.rows_out != nullptr) *request.rows_out = arrays.write(*request.rows_out);
  }

  ArrayRef logits_;
  std::optional<CallRouting> held_;  ///< another thread may give the object a new value meanwhile
  std::optional<GivenInputs> given_;
};

/// Imports, checks what only Python has (kinds of arrays, out=), calls run(context, layer, io,
/// workspace) without the GIL, and returns y or (y, Routing).
template <class Run>
py::object run_forward(const ForwardRequest& request, Run&& run) {
  const char* operation = request.operation;
  CallInputs inputs(request);
  require<ConfigError>(!request.accumulate || !request.out.is_none(), [&] {
    return Problem{operation, "accumulate", "an out= to add to", "none", {}};
  });
  const ArrayRef& x = inputs.x;
  std::optional<CallRouting> routed;
  if (request.return_routing) routed.emplace(inputs.make_routing(request));
  Result result(request.x, x, inputs.io.x.dtype,
                {x.view.shape.begin(), x.view.shape.begin() + x.view.rank}, request.out, operation,
                true, inputs.target);
  inputs.io.out = merged_out(result.view(), x.view.rank - 1, operation);
  inputs.io.accumulate = request.accumulate;
  inputs.run(request, [&](Workspace& workspace) {
    run(inputs.call.context, request.layer, inputs.io, workspace);
  });
  py::object y = result.finish();
  if (!request.return_routing) return y;
  return py::make_tuple(std::move(y), py::cast(routed->object()));
}

}  // namespace moesaic::python
