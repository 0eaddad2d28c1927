// Routes tokens: logits [T, E] f32 -> topk_ids [T, top_k], topk_weights [T, top_k].
//
// One team (team.cuh) per token; its logits stay in registers from load to pick:
//
//   experts  0  1  2 ... 31 | 32 ... 63 | ...      warp per token: E <= 512, four tokens a block
//   lane     0  1  2 ... 31 |  0 ... 31 | ...      block of 8 warps per token: E <= 4096
//   register 0  0  0 ...  0 |  1 ...  1 | ...
//
// Steps and rules are those of route_rows (cpp/src/route/route.cpp), operation for operation. Only
// the sum of the softmax runs in another order (a fixed tree): ids agree unless two scores differ
// by the last bit, weights to a few parts in 1e7. Preconditions: 1 <= top_k <= 64, top_k <= E <=
// 4096, finite biases. Not measured on hardware.
#pragma once

#include "plugin.h"
#include "route/team.cuh"

namespace moesaic::cuda {

// Placeholder until the selection key is known.
inline constexpr int32_t kUsableKey = 0;

// Fills scores with finite logits (-inf where unusable) and marks unusable experts in keys. Items
// that are no experts get kPickedKey. Returns false when no logit is usable.
template <int kWarps, int kPerLane>
MOESAIC_DEV bool load_logits(Team<kWarps, kPerLane>& team, const op::Route& args, int64_t token,
                             float (&scores)[kPerLane], int32_t (&keys)[kPerLane]) {
  const float* const row = args.logits + token * args.row_stride;
  bool nonfinite = false;
  bool usable = false;
  MOESAIC_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    const int e = team.item(i);
    scores[i] = -INFINITY;
    keys[i] = kPickedKey;
    if (e >= args.num_experts) continue;
    const float logit = row[e];
    nonfinite = nonfinite || is_nonfinite(logit);
    if (is_usable(logit)) {
      usable = true;
      keys[i] = kUsableKey;
      scores[i] = fminf(logit, kLargestFloat);
      if (args.router_bias != nullptr) {
        scores[i] = clamp_finite(scores[i] + args.router_bias[e]);
      }
    } else {
      keys[i] = logit != logit ? kNanKey : kMinusInfinityKey;
    }
  }
  nonfinite = team.any(nonfinite);
  if (args.scratch != nullptr && team.rank == 0) {
    static_cast<int32_t*>(args.scratch)[token] = nonfinite ? 1 : 0;
  }
  return !nonfinite || team.any(usable);
}

// Logits to scores, in place; -inf becomes 0 except for SoftmaxSelected, whose scores stay logits.
template <int kWarps, int kPerLane>
MOESAIC_DEV void score(Team<kWarps, kPerLane>& team, ScoreFunction function,
                       float (&values)[kPerLane]) {
  switch (function) {
    case ScoreFunction::Softmax: {
      float largest = values[0];
      MOESAIC_UNROLL
      for (int i = 1; i < kPerLane; ++i) largest = fmaxf(largest, values[i]);
      largest = team.max(largest);
      float sum = 0.0F;
      MOESAIC_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        values[i] = expf(values[i] - largest);
        sum += values[i];
      }
      const float reciprocal = 1.0F / team.sum(sum);
      MOESAIC_UNROLL
      for (int i = 0; i < kPerLane; ++i) values[i] *= reciprocal;
      break;
    }
    case ScoreFunction::SoftmaxSelected:
      break;
    case ScoreFunction::Sigmoid:
      MOESAIC_UNROLL
      for (int i = 0; i < kPerLane; ++i) values[i] = 1.0F / (1.0F + expf(-values[i]));
      break;
    case ScoreFunction::SqrtSoftplus:
      MOESAIC_UNROLL
      for (int i = 0; i < kPerLane; ++i) {
        // Linear above 20, where exp(-x) no longer changes a float.
        values[i] = sqrtf(values[i] > 20.0F ? values[i] : log1pf(expf(values[i])));
      }
      break;
  }
}

// Replaces the placeholder keys of usable experts by their selection keys.
template <int kWarps, int kPerLane>
MOESAIC_DEV void make_keys(const Team<kWarps, kPerLane>& team, const op::Route& args,
                           const float (&selection)[kPerLane], int32_t (&keys)[kPerLane]) {
  MOESAIC_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    if (keys[i] != kUsableKey) continue;
    keys[i] = args.selection_bias == nullptr
                  ? float_key(selection[i])
                  : float_key(clamp_finite(selection[i] + args.selection_bias[team.item(i)]));
  }
}

// Score of a group from its usable members; a group without any comes last. Reading starts at
// `first`, so that the lanes of a warp read from different banks.
MOESAIC_DEV int32_t group_key(const int32_t* keys, int size, int first, GroupReduce reduce) {
  int32_t best = kNanKey;
  int32_t second = kNanKey;
  int at = first % size;
  for (int i = 0; i < size; ++i) {
    const int32_t key = keys[at] > kMinusInfinityKey ? keys[at] : kNanKey;
    second = ::max(second, ::min(best, key));
    best = ::max(best, key);
    at = at + 1 == size ? 0 : at + 1;
  }
  if (reduce == GroupReduce::Max || second == kNanKey) return best;
  return float_key(clamp_finite(key_float(best) + key_float(second)));
}

// Keeps the best groups and masks the experts of all others.
template <int kWarps, int kPerLane>
MOESAIC_DEV void limit_groups(Team<kWarps, kPerLane>& team, const op::Route& args,
                              int32_t (&keys)[kPerLane]) {
  const int size = args.num_experts / args.num_groups;
  int32_t* const shared = team.shared->keys;
  MOESAIC_UNROLL
  for (int i = 0; i < kPerLane; ++i) shared[team.item(i)] = keys[i];
  team.sync();
  int32_t groups[kPerLane];
  MOESAIC_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    const int g = team.item(i);
    groups[i] =
        g < args.num_groups ? group_key(shared + g * size, size, g, args.group_reduce) : kPickedKey;
  }
  for (int n = 0; n < args.groups_used; ++n) team.pick(groups);
  team.sync();  // every key has been read: from here on the memory holds one flag per group
  MOESAIC_UNROLL
  for (int i = 0; i < kPerLane; ++i) shared[team.item(i)] = groups[i] == kPickedKey ? 1 : 0;
  team.sync();
  MOESAIC_UNROLL
  for (int i = 0; i < kPerLane; ++i) {
    const int e = team.item(i);
    if (e >= args.num_experts || shared[e / size] != 0) continue;
    if (args.group_mask == GroupMask::MinusInfinity) {
      keys[i] = kMaskedKey;
    } else if (keys[i] > kMinusInfinityKey) {
      keys[i] = float_key(0.0F);
    }
  }
}

// The sum in slot order, the same in every thread.
MOESAIC_DEV float sum_in_slot_order(const float* weights, int top_k) {
  float sum = 0.0F;
  for (int slot = 0; slot < top_k; ++slot) sum += weights[slot];
  return sum;
}

// Softmax over the selected logits; all 0 when none of them is usable.
template <int kWarps, int kPerLane>
MOESAIC_DEV void softmax_selected(const Team<kWarps, kPerLane>& team, float* weights, int top_k) {
  float largest = -INFINITY;
  for (int slot = 0; slot < top_k; ++slot) largest = fmaxf(largest, weights[slot]);
  const bool any = largest > -INFINITY;
  team.sync();
  for (int slot = team.rank; slot < top_k; slot += team.kThreads) {
    weights[slot] = any ? expf(weights[slot] - largest) : 0.0F;
  }
  team.sync();
  const float reciprocal = any ? 1.0F / sum_in_slot_order(weights, top_k) : 0.0F;
  team.sync();
  for (int slot = team.rank; slot < top_k; slot += team.kThreads) weights[slot] *= reciprocal;
  team.sync();
}

MOESAIC_DEV bool is_expert(const op::Route& args, int id) {
  return id >= 0 && id < args.num_experts;
}

// One weight after renormalisation; `sum` is that of the token's weights.
MOESAIC_DEV float renormalized(const op::Route& args, float weight, float sum, bool usable) {
  if (args.guard == NormGuard::None && !(sum > 0.0F)) {
    return usable ? 1.0F / static_cast<float>(args.top_k) : 0.0F;
  }
  if (args.guard == NormGuard::AddEps) sum += args.guard_eps;
  if (args.guard == NormGuard::ClampMin) sum = fmaxf(sum, args.guard_eps);
  return weight / sum;  // a division, because the reciprocal of a tiny sum is infinite
}

// Fills shared ids and weights (scores) slot by slot: the picks, or the ids of the caller.
template <int kWarps, int kPerLane>
MOESAIC_DEV void select(Team<kWarps, kPerLane>& team, const op::Route& args,
                        const int32_t* given_ids, const float (&scores)[kPerLane],
                        int32_t (&keys)[kPerLane]) {
  auto* const shared = team.shared;
  for (int slot = 0; slot < args.top_k; ++slot) {
    const int id = given_ids != nullptr ? given_ids[slot] : team.pick(keys);
    MOESAIC_UNROLL
    for (int i = 0; i < kPerLane; ++i) {
      if (team.item(i) == id) shared->weights[slot] = scores[i];
    }
    if (team.rank == 0) {
      shared->ids[slot] = id;
      if (!is_expert(args, id)) {
        shared->weights[slot] = args.score == ScoreFunction::SoftmaxSelected ? -INFINITY : 0.0F;
      }
    }
  }
  team.sync();
}

// No logit is usable: equal weights.
template <int kWarps, int kPerLane>
MOESAIC_DEV void route_evenly(const Team<kWarps, kPerLane>& team, const op::Route& args,
                              int32_t* ids, float* weights) {
  for (int slot = team.rank; slot < args.top_k; slot += team.kThreads) {
    if (args.select_on != SelectOn::Given) ids[slot] = slot;
    weights[slot] = is_expert(args, ids[slot]) ? 1.0F / static_cast<float>(args.top_k) : 0.0F;
  }
}

template <int kWarps, int kPerLane>
MOESAIC_DEV void route_token(Team<kWarps, kPerLane>& team, const op::Route& args, int64_t token) {
  const int top_k = args.top_k;
  const bool given = args.select_on == SelectOn::Given;
  int32_t* const ids = args.out.topk_ids + token * top_k;
  float* const weights = args.out.topk_weights + token * top_k;

  float scores[kPerLane];
  int32_t keys[kPerLane];
  if (!load_logits(team, args, token, scores, keys)) {
    route_evenly(team, args, ids, weights);
    return;
  }
  if (args.select_on == SelectOn::Logits) make_keys(team, args, scores, keys);
  score(team, args.score, scores);
  if (args.select_on == SelectOn::Scores) make_keys(team, args, scores, keys);
  if (!given && args.groups_used < args.num_groups) limit_groups(team, args, keys);
  select(team, args, given ? ids : nullptr, scores, keys);

  auto* const shared = team.shared;
  if (args.score == ScoreFunction::SoftmaxSelected) softmax_selected(team, shared->weights, top_k);
  const float sum = sum_in_slot_order(shared->weights, top_k);
  const float* const logits = args.logits + token * args.row_stride;
  for (int slot = team.rank; slot < top_k; slot += team.kThreads) {
    const int id = shared->ids[slot];
    float weight = shared->weights[slot];
    if (args.renormalize) {
      weight = renormalized(args, weight, sum, is_expert(args, id) && is_usable(logits[id]));
    }
    if (args.scale != 0.0F && args.scale != 1.0F) weight *= args.scale;
    if (!given) ids[slot] = id;
    weights[slot] = weight;
  }
}

// Teams (tokens) of one block.
template <int kWarps>
inline constexpr int kTeamsPerBlock = kWarps == 1 ? 4 : 1;

template <int kWarps, int kPerLane>
MOESAIC_KERNEL void __launch_bounds__(32 * kWarps * kTeamsPerBlock<kWarps>)
    route_kernel(op::Route args) {
  dev::begin_grid();
  using Routing = Team<kWarps, kPerLane>;
  MOESAIC_SHARED(typename Routing::Shared, shared, [kTeamsPerBlock<kWarps>]);
  const int thread = static_cast<int>(threadIdx.x);
  const int member = thread / Routing::kThreads;
  const int64_t token = int64_t{blockIdx.x} * kTeamsPerBlock<kWarps> + member;
  if (token >= args.out.num_tokens) return;  // a whole team
  Routing team(thread, &shared[member]);
  route_token(team, args, token);
}

}  // namespace moesaic::cuda
