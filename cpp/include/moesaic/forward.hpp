#pragma once

/// The forward passes and the operations they are made of. cpp/README.md follows one token through
/// them.

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "moesaic/context.hpp"
#include "moesaic/layer.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/workspace.hpp"

namespace moesaic {

class UsageCounter;

/// The model's part of a call: what a MoeLayer holds, or loose parts put together by the caller.
struct LayerRef {
  const ExpertStack* stack = nullptr;
  const RouterConfig* router = nullptr;  ///< not needed when a routing is given
  Activation activation{};
  /// Null or empty: logits or a routing must be given.
  const std::vector<float>* router_weight = nullptr;
  const SharedExperts* shared = nullptr;
  const LatentExperts* latent = nullptr;
  const RmsNorm* input_norm = nullptr;   ///< null or empty: the experts read x
  const RmsNorm* router_norm = nullptr;  ///< null or empty: the router reads what the experts read
  bool separate_router_input = false;    ///< the router reads `router_input` of each call
  std::span<const std::int32_t> token_experts;  ///< empty, or [vocabulary, top_k]
  ExpertResidency* residency = nullptr;         ///< null: all experts run from `stack`
  UsageCounter* usage = nullptr;  ///< null, or counts the pairs that are computed (on the CPU)

  LayerRef() = default;
  LayerRef(const MoeLayer& layer);  // NOLINT(google-explicit-constructor)

  /// H of x and of the output.
  std::int64_t hidden_size() const {
    return (latent != nullptr ? latent->projections : *stack).shape().hidden_size;
  }
  /// E of the logits: the stack's experts and the router's identity experts.
  std::int32_t router_experts() const {
    return stack->num_experts() + (router != nullptr ? router->identity_experts : 0);
  }
  WeightOn weight_on() const { return router != nullptr ? router->weight_on : WeightOn::Output; }
};

/// The call's part. Give `logits`, or `routing`, or neither (the layer's own router). A router with
/// SelectOn::Given takes its ids from `token_ids` by the layer's table, or from `routing` without
/// weights.
struct ForwardIo {
  ConstTensorView x;        ///< [T, H] f32, f16 or bf16; rows may be strided
  ConstTensorView logits;   ///< null data, or f32 [T, E]
  RoutingView routing;      ///< null ids, or a ready routing; ids are range-checked
  TensorView out;           ///< [T, H] f32, f16 or bf16; must not overlap x
  bool accumulate = false;  ///< add to out instead of assigning
  RoutingView routing_out;  ///< null ids, or receives what was routed
  /// Null data, or what the router reads in place of x, [T, H] like it.
  ConstTensorView router_input;
  ConstTensorView token_ids;  ///< null data, or int32 [T], dense
};

enum class Path : std::uint8_t { Gemv, Bucketed, Aligned };

/// How a call will run; a pure function of sizes and tuning.
/// Path: tuning.gemm when given; else gemv for one token, buckets from two on (experts can repeat).
/// Precision: tuning.precision when given; else exact for batch_invariant and while there are at
/// most two pairs per expert (memory is the limit and exact costs nothing), fast above. On the CPU
/// only pairs that are computed count: not those with id -1, nor those of identity experts. Experts
/// are those in memory (ExpertStack::num_kept).
struct PathChoice {
  Path path = Path::Gemv;
  RowSpace row_space = RowSpace::TokenPairs;
  Precision precision = Precision::Exact;
  std::string_view reason;
};
PathChoice choose_path(std::int64_t num_tokens, std::int64_t num_pairs, std::int32_t num_experts,
                       const Tuning& tuning);

/// Bytes a workspace must have for up to `max_tokens` tokens on every path, by running the carve
/// function.
std::size_t workspace_bytes(const Context& context, const LayerRef& layer, std::int32_t top_k,
                            std::int64_t max_tokens);

/// Any path. Errors: ShapeError, DTypeError, DeviceError, WorkspaceError, UnsupportedError; nothing
/// is written to `out` on an error. T = 0 is legal. No allocation.
void moe_forward(Context& context, const LayerRef& layer, const ForwardIo& io,
                 Workspace& workspace);

/// Plan first, then phase GEMMs over buckets or aligned blocks. `gemm` Auto means bucketed.
void moe_forward_bucketed(Context& context, const LayerRef& layer, const ForwardIo& io,
                          Workspace& workspace, GemmMode gemm = GemmMode::Auto,
                          RowSpaceMode row_space = RowSpaceMode::Auto);

/// A forward in three calls, for whoever runs the experts of one layer in several places: moe_route,
/// then moe_expert_rows with parts of the routing (ids of -1 in place of the others), then
/// moe_finish with all rows. With a given precision or batch_invariant the three give what
/// moe_forward gives, bit for bit: it is made of the same steps.
///
/// What the layer's router gives for io.x, into io.routing_out; io.out is not read. Errors: as
/// moe_forward; ConfigError for a ready routing.
void moe_route(Context& context, const LayerRef& layer, const ForwardIo& io, Workspace& workspace);

/// Pairs of `routing`, in host memory, that experts with weights compute: the rows of
/// moe_expert_rows.
std::int64_t count_expert_rows(const LayerRef& layer, const RoutingView& routing);

/// rows [count_expert_rows, H'] f32, dense: what the expert of each pair gives, unweighted, in the
/// order of the pairs; skipped pairs and those of identity experts have none. H' is the experts'
/// width, which latent experts have of their own. Weights that act on the input (WeightOn::Input) are
/// in. Reads io.x and io.routing. Errors: as moe_forward; UnsupportedError on a device.
void moe_expert_rows(Context& context, const LayerRef& layer, const ForwardIo& io, TensorView rows,
                     Workspace& workspace);

/// io.out from such rows: their weighted sum in slot order, the projection of latent experts,
/// identity and shared experts, rounding to the type of out. Reads io.x and io.routing, and no
/// weights of the routed experts. Errors: as moe_expert_rows.
void moe_finish(Context& context, const LayerRef& layer, const ForwardIo& io,
                const ConstTensorView& rows, Workspace& workspace);

/// The reference: f32, one pair after another, written for reading. Ignores tuning and workspace;
/// may allocate.
void moe_forward_cpu(const LayerRef& layer, const ForwardIo& io);

/// What moe_forward would do with `num_tokens` of which no pair is skipped: path, precision, block
/// size, kernels, bytes, reasons.
struct Explanation {
  std::vector<std::pair<std::string, std::string>> facts;  ///< ordered name, value
};
Explanation explain(const Context& context, const LayerRef& layer, std::int32_t top_k,
                    std::int64_t num_tokens);

/// Named operations on the parts of a forward. Tensors lie on the context's device, plans and
/// Routings in host memory. A device is given copies of them, and scratch memory of the call's own:
/// both are a CaptureError while its stream records a graph, and the call returns only when its
/// launches are done, because that memory ends with it.
///
/// On one role of a stack: `ids` int32 [k] or [T, k], dense; ids of -1 write zero rows. x is [K],
/// [T, K] (broadcast over slots) or [T, k, K] (one row per slot), any strides; out is f32, dense.
void expert_gemv(Context& context, const ExpertStack& stack, Role role, const ConstTensorView& x,
                 const ConstTensorView& ids, TensorView out, Precision precision = Precision::Auto);
/// activation(gate x, up x) per slot.
void expert_gemv_gate_up(Context& context, const ExpertStack& stack, const Activation& activation,
                         const ConstTensorView& x, const ConstTensorView& ids, TensorView out,
                         Precision precision = Precision::Auto);
/// Over a plan: gate and up read x [T, H], down reads [P, I] in pair order; out f32 [P, rows] in
/// pair order.
void expert_gemm(Context& context, const ExpertStack& stack, Role role, const ConstTensorView& x,
                 const BucketPlan& plan, TensorView out, Precision precision = Precision::Auto);

/// out [P, H] f32 = x rows in packed order; rows behind expert_offsets[E] are zero.
void gather_rows(Context& context, const ConstTensorView& x, const BucketPlan& plan,
                 TensorView out);
/// out [P, I] f32 = silu(gate) * up of gate_up [P, 2I], gate first.
void silu_mul(Context& context, const ConstTensorView& gate_up, TensorView out);
/// out [T, H] = sum over slots of weight * rows[pair_row].
void combine(Context& context, const ConstTensorView& rows, const BucketPlan& plan,
             const Routing& routing, TensorView out, bool accumulate = false);
/// out [T, H] = sum over slots of weight * pairs[t, slot].
void weighted_sum(Context& context, const ConstTensorView& pairs, const Routing& routing,
                  TensorView out, bool accumulate = false);
/// combine and weighted_sum with a routing on the context's device; ids below 0 are skipped.
void combine(Context& context, const ConstTensorView& rows, const BucketPlan& plan,
             const RoutingView& routing, TensorView out, bool accumulate = false);
void weighted_sum(Context& context, const ConstTensorView& pairs, const RoutingView& routing,
                  TensorView out, bool accumulate = false);

}  // namespace moesaic
