/// Routings in the memory of a GPU.

#include <limits>
#include <utility>

#include "devices.hpp"
#include "dlpack.hpp"
#include "moesaic/error.hpp"
#include "result.hpp"
#include "routing.hpp"

namespace moesaic::python {
namespace {

/// Imports one array of a routing. Throws unless it is dense [T, top_k] of this type.
ArrayRef import_routing_part(py::handle array, const char* name, DType dtype,
                             const DeviceStream& target, const char* operation) {
  ArrayRef ref = import_array(array, operation, name, target);
  require<DTypeError>(ref.view.dtype == dtype, [&] {
    return Problem{operation,
                   name,
                   std::string(name_of(dtype)) + " on " + to_string(target.device),
                   name_of(ref.view.dtype),
                   {}};
  });
  require<ShapeError>(
      ref.view.rank == 2 && is_dense(ref.view) &&
          ref.view.dim(1) <= std::numeric_limits<std::int32_t>::max(),
      [&] { return Problem{operation, name, "dense [T, top_k]", describe(ref.view), {}}; });
  return ref;
}

/// A routing in arrays of the package that `like` is from. Where that makes no empty arrays, one that
/// a caller will see (`shown`) is an UnsupportedError, another is made in memory of its own.
std::shared_ptr<const DeviceRouting> empty_routing(bool shown, std::int64_t num_tokens,
                                                   std::int32_t top_k, const DeviceStream& target,
                                                   py::handle like, const char* operation) {
  const std::vector<std::int64_t> shape{num_tokens, top_k};
  const auto part = [&](DType dtype) {
    py::object made = foreign_empty(like, target.device, false, dtype, shape);
    return made || shown ? made : device_memory(dtype, shape, target.device, operation);
  };
  py::object ids = part(DType::I32), weights = part(DType::F32);
  require<UnsupportedError>(ids && weights, [&] {
    return Problem{operation, "routing of the result", "an array package that makes empty arrays",
                   type_name(like), "route with return_routing=False, or on the cpu"};
  });
  return std::make_shared<const DeviceRouting>(
      DeviceRouting{target.device, std::move(ids), std::move(weights), num_tokens, top_k});
}

}  // namespace

std::shared_ptr<const DeviceRouting> device_routing(const py::object& topk_ids,
                                                    const py::object& topk_weights) {
  constexpr const char* kOperation = "Routing";
  const Device device = device_of(topk_ids, kOperation, "topk_ids");
  if (device.type == DeviceType::Cpu) return nullptr;
  const DeviceStream target = device_stream(device, py::none(), topk_ids, kOperation);
  const ArrayRef ids = import_routing_part(topk_ids, "topk_ids", DType::I32, target, kOperation);
  const ArrayRef weights =
      import_routing_part(topk_weights, "topk_weights", DType::F32, target, kOperation);
  require<ShapeError>(
      weights.view.dim(0) == ids.view.dim(0) && weights.view.dim(1) == ids.view.dim(1), [&] {
        return Problem{kOperation,
                       "topk_weights",
                       "the shape of topk_ids, " + describe(ids.view),
                       describe(weights.view),
                       {}};
      });
  return std::make_shared<const DeviceRouting>(DeviceRouting{
      device, topk_ids, topk_weights, ids.view.dim(0), static_cast<std::int32_t>(ids.view.dim(1))});
}

CallRouting::CallRouting(const RoutingObject& given, const DeviceStream& target, py::handle like,
                         Context& context, const char* operation)
    : object_(given) {
  if (target.device.type == DeviceType::Cpu || object_.device != nullptr) {
    borrow(target, operation);
    return;
  }
  const Backend& backend = context.backend();
  require<CaptureError>(!backend.capturing(context), [&] {
    return Problem{operation,
                   "routing",
                   "arrays on " + to_string(target.device),
                   "host memory while a graph is recorded",
                   {}};
  });
  const RoutingView host = given.view();
  object_.device = empty_routing(false, host.num_tokens, host.top_k, target, like, operation);
  borrow(target, operation);
  const auto pairs = static_cast<std::size_t>(host.num_pairs());
  backend.copy_on_stream(context, view_.topk_ids, host.topk_ids, pairs * sizeof(std::int32_t));
  backend.copy_on_stream(context, view_.topk_weights, host.topk_weights, pairs * sizeof(float));
  // The host's arrays may change as soon as this returns.
  backend.synchronize(context);
}

CallRouting::CallRouting(std::int64_t num_tokens, std::int32_t top_k, const DeviceStream& target,
                         py::handle like, const char* operation) {
  if (target.device.type == DeviceType::Cpu) {
    object_.resized(num_tokens, top_k);
    object_.maker = ArrayMaker::like(like);
  } else {
    object_.device = empty_routing(true, num_tokens, top_k, target, like, operation);
  }
  borrow(target, operation);
}

void CallRouting::borrow(const DeviceStream& target, const char* operation) {
  const Device where = object_.device != nullptr ? object_.device->where : Device{};
  require<DeviceError>(where == target.device, [&] {
    return Problem{operation, "routing", "on " + to_string(target.device), to_string(where), {}};
  });
  if (object_.device == nullptr) {
    view_ = object_.view();
    return;
  }
  const DeviceRouting& device = *object_.device;
  ids_ = import_routing_part(device.topk_ids, "topk_ids", DType::I32, target, operation);
  weights_ =
      import_routing_part(device.topk_weights, "topk_weights", DType::F32, target, operation);
  view_ = {static_cast<std::int32_t*>(ids_.view.data), static_cast<float*>(weights_.view.data),
           device.num_tokens, device.top_k};
}

}  // namespace moesaic::python
