#pragma once

/// The description of a router, and what it gives: expert ids (int32) and weights (f32). An id of
/// -1 marks a pair that is skipped.

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "moesaic/operations.hpp"
#include "moesaic/types.hpp"

namespace moesaic {

class ThreadPool;

/// A router: its rules and its biases.
struct RouterConfig : RouterRules {
  std::vector<float> router_bias;     ///< empty or [E], added to the logits
  std::vector<float> selection_bias;  ///< empty or [E], added for the selection only

  /// Experts that have weights.
  std::int32_t weighted_experts() const { return num_experts - identity_experts; }
  /// Throws ConfigError on a contradiction (top_k > E, groups that do not divide E, ...).
  void validate() const;
};

/// A routing that owns its arrays. `resize` keeps their capacity, so that a call of the same size
/// does not allocate.
class Routing {
 public:
  Routing() = default;
  Routing(std::int64_t num_tokens, std::int32_t top_k) { resize(num_tokens, top_k); }
  void resize(std::int64_t num_tokens, std::int32_t top_k);
  std::int64_t num_tokens() const { return num_tokens_; }
  std::int32_t top_k() const { return top_k_; }
  std::span<const std::int32_t> topk_ids() const { return ids_; }
  std::span<const float> topk_weights() const { return weights_; }
  std::span<std::int32_t> topk_ids() { return ids_; }
  std::span<float> topk_weights() { return weights_; }
  RoutingView view() { return {ids_.data(), weights_.data(), num_tokens_, top_k_}; }

 private:
  std::int64_t num_tokens_ = 0;
  std::int32_t top_k_ = 0;
  std::vector<std::int32_t> ids_;
  std::vector<float> weights_;
};

struct RouteStats {
  std::int64_t nonfinite_rows = 0;  ///< rows that held NaN or an infinity
};

/// f32 scratch elements that route_rows needs per thread.
std::int64_t route_scratch_elems(const RouterRules& router);

/// The operation of a router that has nothing to route yet.
op::Route route_by(const RouterConfig& config);

/// Routes in the calling thread, in host memory; `scratch` has route_scratch_elems. It does not
/// allocate, and no value makes it throw, because a token that overflowed must not stop the batch:
/// the order is finite and +inf > -inf > NaN, +inf counts as the largest float, NaN and -inf get
/// weight 0, and a row without any finite or +inf logit gives ids 0..top_k-1 with weights 1/top_k.
RouteStats route_rows(const op::Route& call);

/// Checks shapes, resizes `out` and routes. It allocates only while the capacity of `out` is too
/// small. With SelectOn::Given `out` brings its ids and its size.
/// Errors: ShapeError (logits not [T, E], ids out of range), DTypeError (not f32), ConfigError.
RouteStats route(const ConstTensorView& logits, const RouterConfig& config, Routing& out);

/// Rejects ids < -1 or >= num_experts with a ShapeError naming the first.
void check_ids(const RoutingView& routing, std::int32_t num_experts, std::string_view operation);

}  // namespace moesaic
