#pragma once

#include <memory>

#include "arrays.hpp"
#include "bindings.hpp"
#include "moesaic/context.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/routing.hpp"
#include "result.hpp"

namespace moesaic::python {

/// Arrays of the caller in the memory of a GPU: ids i32 and weights f32, both dense [T, top_k].
struct DeviceRouting {
  Device where;
  py::object topk_ids, topk_weights;
  std::int64_t num_tokens;
  std::int32_t top_k;
};

/// A value whose numpy views may outlive a change of it: the views share `value`, and a change that
/// would move memory under them makes a new one instead.
struct RoutingObject {
  std::shared_ptr<Routing> value = std::make_shared<Routing>();
  /// Set for a routing on a GPU; `value` is then empty. The caller's arrays, not copies.
  std::shared_ptr<const DeviceRouting> device{};
  /// Of the package whose arrays the routing was made of or for.
  ArrayMaker maker{};
  /// The value, with room for `num_tokens` x `top_k` pairs: a new one while a call or an array uses
  /// the old one.
  Routing& resized(std::int64_t num_tokens, std::int32_t top_k);
  RoutingView view() const { return value->view(); }
  std::int64_t num_tokens() const { return device ? device->num_tokens : value->num_tokens(); }
  std::int32_t top_k() const { return device ? device->top_k : value->top_k(); }
};

/// Fills a routing without the GIL. Other threads see one without tokens meanwhile, since what they
/// check must not change afterwards.
class RoutingFill {
 public:
  RoutingFill(RoutingObject& object, std::int64_t num_tokens, std::int32_t top_k);
  ~RoutingFill() { object_.value = std::move(target_); }
  RoutingFill(const RoutingFill&) = delete;
  RoutingFill& operator=(const RoutingFill&) = delete;
  Routing& target() const { return *target_; }

 private:
  RoutingObject& object_;
  std::shared_ptr<Routing> target_;
};

/// The arrays of a routing in host memory. Throws DeviceError for one on a GPU.
std::shared_ptr<Routing> host_routing(const RoutingObject& routing, const char* operation);

/// A routing on the GPU of `topk_ids`, or null when they lie in host memory. Errors: ShapeError,
/// DTypeError, DeviceError.
std::shared_ptr<const DeviceRouting> device_routing(const py::object& topk_ids,
                                                    const py::object& topk_weights);

/// A routing as one call reads or fills it, where that works; borrows the arrays while it lives.
class CallRouting {
 public:
  /// A given routing, moved to a GPU when it is not there. Throws CaptureError when that would be
  /// during a capture, DeviceError for a routing of another device.
  CallRouting(const RoutingObject& given, const DeviceStream& target, py::handle like,
              Context& context, const char* operation);
  /// A new routing that the call fills.
  CallRouting(std::int64_t num_tokens, std::int32_t top_k, const DeviceStream& target,
              py::handle like, const char* operation);
  const RoutingView& view() const { return view_; }
  RoutingObject object() const { return object_; }

 private:
  void borrow(const DeviceStream& target, const char* operation);
  RoutingObject object_;
  ArrayRef ids_, weights_;
  RoutingView view_;
};

struct PlanObject {
  std::shared_ptr<BucketPlan> value;
};

}  // namespace moesaic::python
