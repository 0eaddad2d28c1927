#pragma once

/// The steps of a forward, in order (cpp/README.md).

#include "forward/check_call.hpp"
#include "forward/row_maps.hpp"
#include "forward/scratch.hpp"

namespace moesaic::forward {

/// What every step of one call reads.
struct Call {
  const char* operation;
  Context& context;
  const LayerRef& layer;
  const ForwardIo& io;
  CallSizes sizes;
  InputRows x;  ///< what the experts read, at the full width
  const Scratch& scratch;

  const ExpertStack& stack() const { return *layer.stack; }
  const Backend& backend() const { return context.backend(); }
};

/// What a call with tokens needs before its scratch is carved: a backend for its weights and parts,
/// ids on a device looked at, values uploaded that a device still lacks.
void make_ready(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
                const CallSizes& sizes);

/// All steps, with the path chosen by `tuning`.
void run(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
         Workspace& workspace, const Tuning& tuning);

/// x, under the layer's input norm where it has one.
InputRows expert_input(Context& context, const LayerRef& layer, const ForwardIo& io,
                       const Scratch& scratch);
/// What the router reads: its own tensor, x under its own norm, or what the experts read.
InputRows router_input(const Call& call);

/// What the knob `route` asks for can be had: ConfigError for "device" on the CPU, CaptureError for
/// "host" while the context's stream records a graph.
void check_route_mode(const char* operation, const Context& context);
/// Whether routing runs on the host for a layer on a device.
bool routes_on_host(const Context& context);
/// route_rows of logits in device memory: they are copied to the host, the routing to the device.
/// Allocates, and waits for the stream twice.
RouteStats route_on_host(const Call& call, const float* logits, std::int64_t row_stride,
                         const RoutingView& out);

/// Computes router logits when none are given, then takes the top-k or weighs the given ids; a
/// ready routing is returned as it is. Throws ConfigError for non-finite logits under `strict`.
RoutingView route_tokens(const Call& call);

/// The pairs as the experts see them: on the host -1 for identity experts (a device takes ids
/// outside the experts as -1), no weights where these are on the input.
RoutingView expert_pairs(const Call& call, const RoutingView& routing);
/// Factors of gate_up's rows, by destination; null unless the weights are on the input. After the
/// plan.
const float* row_weights(const Call& call, const RoutingView& routing, RowSpace row_space);

/// Bucket plan, blocks when aligned; gathers `in` for packed rows, which then is what gate_up
/// reads.
PhaseMaps plan_buckets(const Call& call, const RoutingView& routing, const PathChoice& choice,
                       InputRows& in);

/// How the pairs will run: choose_path of those that are computed.
PathChoice choose(const Call& call, const RoutingView& pairs, const Tuning& tuning);

/// Both phases of the routed experts, with everything but the sum of the second.
struct ExpertPhases {
  op::GateUp gate_up;
  op::Down down;
  const std::int32_t* pair_row;  ///< as in PhaseMaps
};
ExpertPhases expert_phases(const Call& call, const RoutingView& routing, const RoutingView& pairs,
                           const PathChoice& choice);
/// Runs both, where the layer's experts are.
void run_experts(const Call& call, const ExpertPhases& phases);

/// Where the terms of the result meet. Several are summed in f32 and rounded once.
struct Sums {
  TensorView sum;           ///< of all terms, at the full width
  TensorView routed;        ///< of the routed experts: `sum`, or latent_sum of latent ones
  bool direct = true;       ///< `sum` is the output
  bool accumulate = false;  ///< `routed` holds a term already
};
Sums sums_of(const Call& call);
/// The weighted sum of the pairs' rows into sums.routed.
op::Combine sum_of_rows(const Call& call, const RoutingView& pairs, const Sums& sums,
                        const void* rows, DType rows_dtype, const std::int32_t* pair_row);
/// All that follows that sum: projection up, identity experts, shared experts, rounding.
void add_rest(const Call& call, const RoutingView& routing, const Sums& sums, const Tuning& tuning);

/// What the routed experts read: x, projected down for latent experts.
InputRows project_down(const Call& call);
/// The weighted sum of latent experts, normed and projected up into `sum`.
void project_up(const Call& call, const TensorView& sum, bool accumulate);

/// A routing of every token to expert 0 with weight 1.
RoutingView every_token_once(const Call& call);
/// Adds x times the weights of the identity experts to `sum`.
void add_identity(const Call& call, const RoutingView& routing, const TensorView& sum);
/// Adds the shared experts to `sum`.
void add_shared(const Call& call, const TensorView& sum, const Tuning& tuning);

/// Counts the experts of one call and what it read, for whoever asked.
void count_call(const Call& call, const RoutingView& routing);

}  // namespace moesaic::forward
