#pragma once

/// The steps of a forward, in order (cpp/README.md).

#include "forward/check.hpp"
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
  InputRows x;
  const Scratch& scratch;

  const ExpertStack& stack() const { return *layer.stack; }
  const Backend& backend() const { return context.backend(); }
};

/// All steps, with the path chosen by `tuning`.
void run(const char* operation, Context& context, const LayerRef& layer, const ForwardIo& io,
         Workspace& workspace, const Tuning& tuning);

/// Router logits when none are given, then top-k; or the routing that was given.
/// Throws Error for non-finite logits under `strict`.
RoutingView route_tokens(const Call& call);

/// Bucket plan, blocks when aligned; gathers x for packed rows. `in` becomes what gate_up reads.
PhaseMaps plan_buckets(const Call& call, const RoutingView& routing, const PathChoice& choice,
                       InputRows& in);

/// Adds the shared experts to `sum`, then `sum` to the output where they differ.
void add_shared(const Call& call, const TensorView& sum, const Tuning& tuning);

/// Counters of one call; nothing without a profiler.
void count_call(const Call& call, const RoutingView& routing);

}  // namespace moesaic::forward
