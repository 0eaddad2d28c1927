#pragma once

/// The description of a router, and what it gives: expert ids (int32) and weights (f32). An id of
/// -1 marks a pair that is skipped.

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "moesaic/types.hpp"

namespace moesaic {

class ThreadPool;

/// What turns a logit into a score.
enum class ScoreFunction : std::uint8_t {
  Softmax,          ///< softmax over all experts, then top-k
  SoftmaxSelected,  ///< top-k on the logits, then softmax over the selected
  Sigmoid,
  SqrtSoftplus,  ///< sqrt(log(1 + exp(logit)))
};
/// The score of a group of experts: the sum of its two best (DeepSeek-V3) or its best
/// (DeepSeek-V2).
enum class GroupReduce : std::uint8_t { Top2Sum, Max };
/// What the scores of the experts in other groups become before top-k. With Zero an expert of a
/// chosen group whose biased score is negative loses to a masked one, as in some models.
enum class GroupMask : std::uint8_t { MinusInfinity, Zero };
/// What keeps the renormalising division from zero.
enum class NormGuard : std::uint8_t {
  None,
  AddEps,    ///< w / (sum + eps)
  ClampMin,  ///< w / max(sum, eps)
};
/// Where the weight of a pair acts.
enum class WeightOn : std::uint8_t {
  Output,
  Input,  ///< x is scaled before the expert (Llama-4), whose output then counts with weight 1
};
/// What the selection reads.
enum class SelectOn : std::uint8_t {
  Scores,
  Logits,
  Given,  ///< ids from the caller or a table by token id; only their weights are computed
};

/// A router, factored into facts that do not depend on one another. The steps in their order:
/// logits (+ router_bias), score, selection (score or logit, + selection_bias, group limit), top-k,
/// weights from the unbiased scores, renormalisation, scale. Those of each model, with their
/// source, stand in model/model_table.hpp.
struct RouterConfig {
  std::int32_t num_experts = 0;  ///< E of the logits, identity experts included
  std::int32_t top_k = 0;
  ScoreFunction score = ScoreFunction::Softmax;
  bool renormalize = true;
  NormGuard guard = NormGuard::None;
  float guard_eps = 0.0F;
  float scale = 1.0F;  ///< factor on the weights; 0 and 1 both mean none
  SelectOn select_on = SelectOn::Scores;
  std::int32_t num_groups = 1;
  std::int32_t groups_used = 1;
  GroupReduce group_reduce = GroupReduce::Top2Sum;
  GroupMask group_mask = GroupMask::MinusInfinity;
  WeightOn weight_on = WeightOn::Output;
  std::int32_t identity_experts = 0;  ///< the last ids, without weights: they give x itself
  std::vector<float> router_bias;     ///< empty or [E], added to the logits
  std::vector<float> selection_bias;  ///< empty or [E], added for the selection only

  /// Experts that have weights.
  std::int32_t weighted_experts() const { return num_experts - identity_experts; }
  /// Throws ConfigError on a contradiction (top_k > E, groups that do not divide E, ...).
  void validate() const;
};

/// topk_ids i32 [T, top_k] and topk_weights f32 [T, top_k], both dense. The slots of a token stand
/// in descending order of what the selection read (which is the order of the weights where no bias
/// and no group takes part); of equal ones the lower expert id comes first. A pair is `token *
/// top_k + slot`.
struct RoutingView {
  std::int32_t* topk_ids = nullptr;
  float* topk_weights = nullptr;
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  std::int64_t num_pairs() const { return num_tokens * top_k; }
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

/// The f32 elements of scratch that route_rows needs per thread.
std::int64_t route_scratch_elems(const RouterConfig& config);

/// Routes `logits` [T, E] (f32, row stride in elements) into `out`. It does not allocate, and no
/// value makes it throw, because a token that overflowed must not stop the batch: the order is
/// finite and +inf > -inf > NaN, +inf counts as the largest float, NaN and -inf get weight 0, and a
/// row without any finite or +inf logit gives ids 0..top_k-1 with weights 1/top_k. With
/// SelectOn::Given the ids in `out` are read instead (-1 gets weight 0) and stay as they are.
RouteStats route_rows(const float* logits, std::int64_t row_stride, const RouterConfig& config,
                      RoutingView out, float* scratch);

/// Checks shapes, resizes `out` and routes. It allocates only while the capacity of `out` is too
/// small. With SelectOn::Given `out` brings its ids and its size.
/// Errors: ShapeError (logits not [T, E], ids out of range), DTypeError (not f32), ConfigError.
RouteStats route(const ConstTensorView& logits, const RouterConfig& config, Routing& out);

/// Rejects ids < -1 or >= num_experts with a ShapeError naming the first.
void check_ids(const RoutingView& routing, std::int32_t num_experts, std::string_view operation);

}  // namespace moesaic
