#pragma once

#include <memory>

#include "bindings.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/routing.hpp"

namespace moesaic::python {

/// A value whose numpy views may outlive a change of it: the views share `value`, and a change that
/// would move memory under them makes a new one instead.
struct RoutingObject {
  std::shared_ptr<Routing> value = std::make_shared<Routing>();
  /// Ready for `num_tokens` x `top_k`.
  Routing& resized(std::int64_t num_tokens, std::int32_t top_k);
  RoutingView view() const { return value->view(); }
};

struct PlanObject {
  std::shared_ptr<BucketPlan> value;
};

}  // namespace moesaic::python
