#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <new>
#include <string>

#include "moesaic/error.hpp"
#include "moesaic/interrupt.hpp"
#include "moesaic/routing.hpp"

namespace moesaic {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

/// Experts per block of the two-level arg-max.
constexpr std::int32_t kBlock = 16;

/// A float as an integer of the same order (-0 as +0); the inverse of `from_key`.
constexpr std::int32_t to_key(float value) {
  const auto bits = std::bit_cast<std::int32_t>(value + 0.0F);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}
constexpr float from_key(std::int32_t key) {
  return std::bit_cast<float>(key ^ ((key >> 31) & 0x7fffffff));
}

// Selection keys are `to_key(selection score)`. The integers below that of -inf belong to NaNs,
// which leaves room for what must come after every number.
constexpr std::int32_t kMinusInfinity = to_key(-kInfinity);
constexpr std::int32_t kNan = std::numeric_limits<std::int32_t>::min() + 2;
constexpr std::int32_t kMasked = std::numeric_limits<std::int32_t>::min() + 1;
constexpr std::int32_t kPicked = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kUsable = 0;  ///< placeholder until the selection score is known

/// True for finite values and +inf.
bool is_usable(float logit) { return logit > -kInfinity; }

float clamp_finite(float value) { return std::clamp(value, -kLargest, kLargest); }

std::int32_t round_up(std::int32_t n, std::int32_t step) { return (n + step - 1) / step * step; }

struct Scratch {
  float* scores;            ///< [E] logits, later scores
  std::int32_t* keys;       ///< [E rounded up to kBlock]
  std::int32_t* block_max;  ///< [keys / kBlock]
  std::int32_t* groups;     ///< [num_groups]
};

Scratch carve(const RouterRules& config, float* scratch) {
  const std::int32_t padded = round_up(config.num_experts, kBlock);
  const std::int32_t integers = padded + padded / kBlock + config.num_groups;
  auto* keys = ::new (static_cast<void*>(scratch + config.num_experts)) std::int32_t[integers];
  return {scratch, keys, keys + padded, keys + padded + padded / kBlock};
}

bool has_nonfinite(const float* values, std::int32_t count) {
  constexpr std::uint32_t kExponent = 0x7f800000;
  std::uint32_t found = 0;
  for (std::int32_t i = 0; i < count; ++i) {
    found |= (std::bit_cast<std::uint32_t>(values[i]) & kExponent) == kExponent ? 1U : 0U;
  }
  return found != 0;
}

/// Fills scores with finite logits (-inf where unusable) and marks unusable experts in keys.
/// Returns false when no logit is usable.
bool load_logits(const float* logits, bool nonfinite, const op::Route& config, const Scratch& s) {
  const std::int32_t n = config.num_experts;
  const float* bias = config.router_bias;
  std::fill_n(s.keys, n, kUsable);
  std::fill(s.keys + n, s.keys + round_up(n, kBlock), kPicked);
  std::copy_n(logits, n, s.scores);
  bool any = !nonfinite;
  if (nonfinite) {
    for (std::int32_t e = 0; e < n; ++e) {
      if (is_usable(logits[e])) {
        s.scores[e] = std::min(logits[e], kLargest);
        any = true;
      } else {
        s.keys[e] = std::isnan(logits[e]) ? kNan : kMinusInfinity;
        s.scores[e] = -kInfinity;
      }
    }
  }
  if (bias != nullptr) {
    for (std::int32_t e = 0; e < n; ++e) {
      const float sum = clamp_finite(s.scores[e] + bias[e]);
      s.scores[e] = s.keys[e] == kUsable ? sum : -kInfinity;
    }
  }
  return any;
}

/// Softmax in place: maximum, exponentials, their sum from left to right, times its reciprocal.
void softmax(float* values, std::int32_t count) {
  float largest = -kInfinity;
  for (std::int32_t i = 0; i < count; ++i) largest = values[i] > largest ? values[i] : largest;
  float sum = 0.0F;
  for (std::int32_t i = 0; i < count; ++i) {
    values[i] = std::exp(values[i] - largest);
    sum += values[i];
  }
  const float reciprocal = 1.0F / sum;
  for (std::int32_t i = 0; i < count; ++i) values[i] *= reciprocal;
}

/// Logits to scores, in place; -inf becomes 0 except for SoftmaxSelected, whose scores stay logits.
void score(ScoreFunction function, float* values, std::int32_t count) {
  switch (function) {
    case ScoreFunction::Softmax:
      softmax(values, count);
      break;
    case ScoreFunction::SoftmaxSelected:
      break;
    case ScoreFunction::Sigmoid:
      for (std::int32_t i = 0; i < count; ++i) values[i] = 1.0F / (1.0F + std::exp(-values[i]));
      break;
    case ScoreFunction::SqrtSoftplus:
      for (std::int32_t i = 0; i < count; ++i) {
        // Linear above 20, where exp(-x) no longer changes a float.
        values[i] = std::sqrt(values[i] > 20.0F ? values[i] : std::log1p(std::exp(values[i])));
      }
      break;
  }
}

/// Replaces the placeholder keys of usable experts by their selection keys.
void make_keys(const float* selection, const op::Route& config, std::int32_t* keys) {
  const std::int32_t n = config.num_experts;
  if (config.selection_bias == nullptr) {
    for (std::int32_t e = 0; e < n; ++e) {
      keys[e] = keys[e] == kUsable ? to_key(selection[e]) : keys[e];
    }
    return;
  }
  const float* bias = config.selection_bias;
  for (std::int32_t e = 0; e < n; ++e) {
    const std::int32_t key = to_key(clamp_finite(selection[e] + bias[e]));
    keys[e] = keys[e] == kUsable ? key : keys[e];
  }
}

/// Position of the largest key, the first one of equals.
std::int32_t first_largest(const std::int32_t* keys, std::int32_t count) {
  std::int32_t best = 0;
  for (std::int32_t i = 1; i < count; ++i) best = keys[i] > keys[best] ? i : best;
  return best;
}

/// Score of a group from its usable members; a group without any comes last.
std::int32_t group_key(const std::int32_t* keys, std::int32_t size, GroupReduce reduce) {
  std::int32_t best = kNan;
  std::int32_t second = kNan;
  for (std::int32_t i = 0; i < size; ++i) {
    const std::int32_t key = keys[i] > kMinusInfinity ? keys[i] : kNan;
    second = std::max(second, std::min(best, key));
    best = std::max(best, key);
  }
  if (reduce == GroupReduce::Max || second == kNan) return best;
  return to_key(clamp_finite(from_key(best) + from_key(second)));
}

/// Keeps the best groups and masks the experts of all others.
void limit_groups(const op::Route& config, const Scratch& s) {
  const std::int32_t size = config.num_experts / config.num_groups;
  for (std::int32_t g = 0; g < config.num_groups; ++g) {
    s.groups[g] = group_key(s.keys + g * size, size, config.group_reduce);
  }
  for (std::int32_t i = 0; i < config.groups_used; ++i) {
    s.groups[first_largest(s.groups, config.num_groups)] = kPicked;
  }
  for (std::int32_t e = 0; e < config.num_experts; ++e) {
    if (s.groups[e / size] == kPicked) continue;
    if (config.group_mask == GroupMask::MinusInfinity) {
      s.keys[e] = kMasked;
    } else if (s.keys[e] > kMinusInfinity) {
      s.keys[e] = to_key(0.0F);
    }
  }
}

std::int32_t largest_of_block(const std::int32_t* keys) {
  std::int32_t largest = keys[0];
  for (std::int32_t i = 1; i < kBlock; ++i) largest = keys[i] > largest ? keys[i] : largest;
  return largest;
}

/// The top_k largest keys in descending order, ties to the lower id. A pick looks at one key per
/// block and then at one block.
void pick_top(const op::Route& config, const Scratch& s, std::int32_t* ids) {
  const std::int32_t blocks = round_up(config.num_experts, kBlock) / kBlock;
  for (std::int32_t b = 0; b < blocks; ++b) s.block_max[b] = largest_of_block(s.keys + b * kBlock);
  for (std::int32_t slot = 0; slot < config.top_k; ++slot) {
    const std::int32_t block = first_largest(s.block_max, blocks);
    std::int32_t* keys = s.keys + block * kBlock;
    const std::int32_t lane = first_largest(keys, kBlock);
    ids[slot] = block * kBlock + lane;
    keys[lane] = kPicked;
    s.block_max[block] = largest_of_block(keys);
  }
}

void renormalize(const op::Route& config, const float* logits, const std::int32_t* ids,
                 float* weights) {
  float sum = 0.0F;
  for (std::int32_t slot = 0; slot < config.top_k; ++slot) sum += weights[slot];
  switch (config.guard) {
    case NormGuard::None:
      if (!(sum > 0.0F)) {
        const float share = 1.0F / static_cast<float>(config.top_k);
        for (std::int32_t slot = 0; slot < config.top_k; ++slot) {
          const bool counts = ids[slot] >= 0 && is_usable(logits[ids[slot]]);
          weights[slot] = counts ? share : 0.0F;
        }
        return;
      }
      break;
    case NormGuard::AddEps:
      sum += config.guard_eps;
      break;
    case NormGuard::ClampMin:
      sum = std::max(sum, config.guard_eps);
      break;
  }
  // A division, because the reciprocal of a tiny sum is infinite.
  for (std::int32_t slot = 0; slot < config.top_k; ++slot) weights[slot] /= sum;
}

/// The weights of the chosen ids; an id of -1 gets 0.
void weigh(const float* logits, const op::Route& config, const Scratch& s, const std::int32_t* ids,
           float* weights) {
  const bool selected = config.score == ScoreFunction::SoftmaxSelected;
  const float skipped = selected ? -kInfinity : 0.0F;
  float largest = -kInfinity;
  for (std::int32_t slot = 0; slot < config.top_k; ++slot) {
    weights[slot] = ids[slot] >= 0 ? s.scores[ids[slot]] : skipped;
    largest = std::max(largest, weights[slot]);
  }
  if (selected) {
    if (largest > -kInfinity) {
      softmax(weights, config.top_k);
    } else {
      std::fill_n(weights, config.top_k, 0.0F);
    }
  }
  if (config.renormalize) renormalize(config, logits, ids, weights);
  if (config.scale != 0.0F && config.scale != 1.0F) {
    for (std::int32_t slot = 0; slot < config.top_k; ++slot) weights[slot] *= config.scale;
  }
}

void route_row(const float* logits, bool nonfinite, const op::Route& config, const Scratch& s,
               std::int32_t* ids, float* weights) {
  const bool given = config.select_on == SelectOn::Given;
  if (!load_logits(logits, nonfinite, config, s)) {
    for (std::int32_t slot = 0; slot < config.top_k; ++slot) {
      if (!given) ids[slot] = slot;
      weights[slot] = ids[slot] >= 0 ? 1.0F / static_cast<float>(config.top_k) : 0.0F;
    }
    return;
  }
  if (config.select_on == SelectOn::Logits) make_keys(s.scores, config, s.keys);
  score(config.score, s.scores, config.num_experts);
  if (config.select_on == SelectOn::Scores) make_keys(s.scores, config, s.keys);
  if (!given) {
    if (config.groups_used < config.num_groups) limit_groups(config, s);
    pick_top(config, s, ids);
  }
  weigh(logits, config, s, ids, weights);
}

}  // namespace

void Routing::resize(std::int64_t num_tokens, std::int32_t top_k) {
  // Pair indices are int32.
  constexpr std::int64_t kMaxPairs = std::numeric_limits<std::int32_t>::max();
  require<ShapeError>(num_tokens >= 0 && top_k >= 1 && num_tokens <= kMaxPairs / top_k, [&] {
    return Problem{"Routing", "num_tokens * top_k", "top_k >= 1 and fewer than 2^31 pairs",
                   std::to_string(num_tokens) + " * " + std::to_string(top_k), ""};
  });
  const auto pairs = static_cast<std::size_t>(num_tokens) * static_cast<std::size_t>(top_k);
  ids_.resize(pairs);
  weights_.resize(pairs);
  num_tokens_ = num_tokens;
  top_k_ = top_k;
}

std::int64_t route_scratch_elems(const RouterRules& router) {
  const std::int64_t padded = round_up(router.num_experts, kBlock);
  return router.num_experts + padded + padded / kBlock + router.num_groups;
}

op::Route route_by(const RouterConfig& config) {
  op::Route call;
  static_cast<RouterRules&>(call) = config;
  call.router_bias = config.router_bias.empty() ? nullptr : config.router_bias.data();
  call.selection_bias = config.selection_bias.empty() ? nullptr : config.selection_bias.data();
  return call;
}

RouteStats route_rows(const op::Route& call) {
  RouteStats stats;
  const Scratch s = carve(call, static_cast<float*>(call.scratch));
  const RoutingView& out = call.out;
  for (std::int64_t t = 0; t < out.num_tokens; ++t) {
    const float* row = call.logits + t * call.row_stride;
    const bool nonfinite = has_nonfinite(row, call.num_experts);
    stats.nonfinite_rows += nonfinite ? 1 : 0;
    route_row(row, nonfinite, call, s, out.topk_ids + t * out.top_k,
              out.topk_weights + t * out.top_k);
  }
  return stats;
}

RouteStats route(const ConstTensorView& logits, const RouterConfig& config, Routing& out) {
  config.validate();
  const std::int64_t experts = config.num_experts;
  require<DTypeError>(logits.dtype == DType::F32,
                      [&] { return Problem{"route", "logits", "f32", name_of(logits.dtype), ""}; });
  require<DeviceError>(logits.device.type == DeviceType::Cpu, [&] {
    return Problem{"route", "logits", "memory of the CPU", to_string(logits.device), ""};
  });
  require<ShapeError>(
      logits.rank == 2 && logits.dim(1) == experts && (experts == 1 || logits.stride(1) == 1), [&] {
        return Problem{"route", "logits", "[T, " + std::to_string(experts) + "] with dense rows",
                       describe(logits), ""};
      });
  if (config.select_on == SelectOn::Given) {
    require<ShapeError>(out.num_tokens() == logits.dim(0) && out.top_k() == config.top_k, [&] {
      return Problem{
          "route", "given ids",
          "[" + std::to_string(logits.dim(0)) + ", " + std::to_string(config.top_k) + "]",
          "[" + std::to_string(out.num_tokens()) + ", " + std::to_string(out.top_k()) + "]", ""};
    });
    check_ids(out.view(), config.num_experts, "route");
  } else {
    out.resize(logits.dim(0), config.top_k);
  }
  // Kept per thread, so that only the first call of a size allocates.
  thread_local std::vector<float> scratch;
  const auto needed = static_cast<std::size_t>(route_scratch_elems(config));
  if (scratch.size() < needed) scratch.resize(needed);
  op::Route call = route_by(config);
  call.logits = static_cast<const float*>(logits.data);
  call.row_stride = logits.stride(0);
  call.out = out.view();
  call.scratch = scratch.data();
  RouteStats stats;
  constexpr std::int64_t kSlice = 1024;  // tokens between two looks at the clock
  for (std::int64_t t = 0; t < logits.dim(0); t += kSlice) {
    Interrupt::check();
    op::Route part = call;
    part.logits += t * call.row_stride;
    part.out.topk_ids += t * call.out.top_k;
    part.out.topk_weights += t * call.out.top_k;
    part.out.num_tokens = std::min(kSlice, logits.dim(0) - t);
    stats.nonfinite_rows += route_rows(part).nonfinite_rows;
  }
  return stats;
}

void check_ids(const RoutingView& routing, std::int32_t num_experts, std::string_view operation) {
  const std::int64_t pairs = routing.num_pairs();
  bool bad = false;
  for (std::int64_t p = 0; p < pairs; ++p) {
    bad |= routing.topk_ids[p] < -1 || routing.topk_ids[p] >= num_experts;
  }
  if (!bad) [[likely]]
    return;
  const std::int32_t* first =
      std::find_if(routing.topk_ids, routing.topk_ids + pairs,
                   [num_experts](std::int32_t id) { return id < -1 || id >= num_experts; });
  const std::int64_t pair = first - routing.topk_ids;
  throw ShapeError(Problem{std::string(operation),
                           "topk_ids[" + std::to_string(pair / routing.top_k) + ", " +
                               std::to_string(pair % routing.top_k) + "]",
                           "-1 (skipped) or 0 to " + std::to_string(num_experts - 1),
                           std::to_string(*first), ""});
}

}  // namespace moesaic
