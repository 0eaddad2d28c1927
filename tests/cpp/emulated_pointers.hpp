#pragma once

/// The addresses in each argument struct of cuda/plugin.h, for the checks of the emulated GPU.

#include "cuda/plugin.h"

namespace moesaic::testing {

template <class F>
void each_pointer(const cuda::MapArgs& map, F&& f) {
  for (const void* p : {map.expert, map.offsets, map.source, map.destination}) f(p);
}

template <class F>
void each_pointer(const cuda::WeightArgs& weight, F&& f) {
  for (const void* p :
       {weight.base, static_cast<const void*>(weight.table),
        static_cast<const void*>(weight.slot_map), static_cast<const void*>(weight.gather),
        static_cast<const void*>(weight.scale), static_cast<const void*>(weight.bias)}) {
    f(p);
  }
}

template <class F>
void each_pointer(const cuda::RouterLogitsArgs& args, F&& f) {
  for (const void* p : {args.x.data, static_cast<const void*>(args.weight),
                        static_cast<const void*>(args.logits)}) {
    f(p);
  }
}

template <class F>
void each_pointer(const cuda::RouteArgs& args, F&& f) {
  for (const void* p : {args.logits, args.router_bias, args.selection_bias,
                        static_cast<const float*>(args.topk_weights)}) {
    f(p);
  }
  for (const void* p : {args.topk_ids, args.nonfinite}) f(p);
}

template <class F>
void each_pointer(const cuda::LookUpArgs& args, F&& f) {
  f(args.table);
  f(args.token_ids);
  f(args.topk_ids);
}

template <class F>
void each_pointer(const cuda::RmsNormArgs& args, F&& f) {
  f(args.x.data);
  f(args.weight);
  f(args.out);
}

template <class F>
void each_pointer(const cuda::IdentityArgs& args, F&& f) {
  f(args.x.data);
  f(args.topk_ids);
  f(args.topk_weights);
  f(args.out);
}

template <class F>
void each_pointer(const cuda::SharedRoutingArgs& args, F&& f) {
  f(args.logits);
  f(args.topk_ids);
  f(args.topk_weights);
}

template <class F>
void each_pointer(const cuda::BucketPlanArgs& args, F&& f) {
  for (const void* p : {args.topk_ids, static_cast<const std::int32_t*>(args.expert_offsets),
                        static_cast<const std::int32_t*>(args.row_token),
                        static_cast<const std::int32_t*>(args.row_pair),
                        static_cast<const std::int32_t*>(args.pair_row)}) {
    f(p);
  }
  f(args.scratch);
}

template <class F>
void each_pointer(const cuda::AlignArgs& args, F&& f) {
  for (const void* p : {args.expert_offsets, args.row_pair}) f(p);
  for (const void* p : {args.sorted_ids, args.block_experts, args.num_post_pad}) f(p);
}

template <class F>
void each_pointer(const cuda::GatherArgs& args, F&& f) {
  f(args.x.data);
  f(args.index);
  f(args.out);
}

template <class F>
void each_pointer(const cuda::ActivateArgs& args, F&& f) {
  f(args.gate);
  f(args.up);
  f(args.hidden);
}

template <class F>
void each_pointer(const cuda::CombineArgs& args, F&& f) {
  f(args.rows);
  f(args.pair_row);
  f(args.topk_ids);
  f(args.topk_weights);
  f(args.out);
}

template <class F>
void each_pointer(const cuda::ZeroSkippedArgs& args, F&& f) {
  f(args.ids);
  f(args.out);
}

template <class F>
void each_pointer(const cuda::FillArgs& args, F&& f) {
  f(args.data);
}

template <class F>
void each_pointer(const cuda::GemmArgs& args, F&& f) {
  each_pointer(args.weight, f);
  each_pointer(args.map, f);
  f(args.in.data);
  f(args.out);
  f(args.scratch);
}

template <class F>
void each_pointer(const cuda::GateUpArgs& args, F&& f) {
  each_pointer(args.gate, f);
  each_pointer(args.up, f);
  each_pointer(args.map, f);
  f(args.in.data);
  f(args.row_weight);
  f(args.hidden);
  f(args.scratch);
}

template <class F>
void each_pointer(const cuda::DownArgs& args, F&& f) {
  each_pointer(args.weight, f);
  each_pointer(args.map, f);
  each_pointer(args.combine, f);
  f(args.in.data);
  f(args.rows);
  f(args.scratch);
}

}  // namespace moesaic::testing
