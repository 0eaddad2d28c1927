#pragma once

/// The addresses in each operation, for the checks of the emulated GPU.

#include "cuda/plugin.h"

namespace moesaic::testing {

/// Calls f for each of them.
template <class F, class... Pointers>
void visit_pointers(F&& f, Pointers... pointers) {
  (f(static_cast<const void*>(pointers)), ...);
}

template <class F>
void each_pointer(const RowMap& map, F&& f) {
  visit_pointers(f, map.expert, map.offsets, map.source, map.destination);
}
template <class F>
void each_pointer(const RoleRef& role, F&& f) {
  visit_pointers(f, role.ref.base, role.ref.table, role.ref.slot_map, role.ref.int4.gather,
                 role.scale, role.bias);
}
template <class F>
void each_pointer(const RoutingView& routing, F&& f) {
  visit_pointers(f, routing.topk_ids, routing.topk_weights);
}
template <class F>
void each_pointer(const BucketPlanView& plan, F&& f) {
  visit_pointers(f, plan.expert_offsets, plan.row_token, plan.row_pair, plan.pair_row,
                 plan.scratch);
}
template <class F>
void each_pointer(const op::RouterLogits& call, F&& f) {
  visit_pointers(f, call.x.data, call.weight, call.logits);
}
template <class F>
void each_pointer(const op::Route& call, F&& f) {
  visit_pointers(f, call.router_bias, call.selection_bias, call.logits, call.scratch);
  each_pointer(call.out, f);
}
template <class F>
void each_pointer(const op::LookUpExperts& call, F&& f) {
  visit_pointers(f, call.table, call.token_ids);
  each_pointer(call.out, f);
}
template <class F>
void each_pointer(const op::SharedRouting& call, F&& f) {
  visit_pointers(f, call.logits);
  each_pointer(call.out, f);
}
template <class F>
void each_pointer(const op::BucketPlan& call, F&& f) {
  each_pointer(call.routing, f);
  each_pointer(call.out, f);
}
template <class F>
void each_pointer(const op::Align& call, F&& f) {
  each_pointer(call.plan, f);
  visit_pointers(f, call.out.sorted_ids, call.out.block_experts, call.out.num_post_pad);
}
template <class F>
void each_pointer(const op::Gather& call, F&& f) {
  visit_pointers(f, call.x.data, call.index, call.out);
}
template <class F>
void each_pointer(const op::Activate& call, F&& f) {
  visit_pointers(f, call.gate, call.up, call.hidden);
}
template <class F>
void each_pointer(const op::Combine& call, F&& f) {
  visit_pointers(f, call.rows, call.pair_row, call.out.data);
  each_pointer(call.routing, f);
}
template <class F>
void each_pointer(const op::ZeroSkipped& call, F&& f) {
  visit_pointers(f, call.ids, call.out);
}
template <class F>
void each_pointer(const op::RmsNorm& call, F&& f) {
  visit_pointers(f, call.x.data, call.weight, call.out);
}
template <class F>
void each_pointer(const op::AddIdentity& call, F&& f) {
  visit_pointers(f, call.x.data, call.out.data);
  each_pointer(call.routing, f);
}
template <class F>
void each_pointer(const op::Fill& call, F&& f) {
  visit_pointers(f, call.data);
}
template <class F>
void each_pointer(const op::Gemm& call, F&& f) {
  each_pointer(call.weight, f);
  each_pointer(call.map, f);
  visit_pointers(f, call.in.data, call.out, call.scratch);
}
template <class F>
void each_pointer(const op::GateUp& call, F&& f) {
  each_pointer(call.gate, f);
  each_pointer(call.up, f);
  each_pointer(call.map, f);
  visit_pointers(f, call.in.data, call.hidden, call.row_weight, call.gate_up, call.scratch);
}
template <class F>
void each_pointer(const op::Down& call, F&& f) {
  each_pointer(call.weight, f);
  each_pointer(call.map, f);
  each_pointer(call.combine, f);
  visit_pointers(f, call.in.data, call.rows, call.scratch);
}

}  // namespace moesaic::testing
