#pragma once

/// Named views into the caller's workspace.

#include <cstddef>
#include <cstdint>

#include "moesaic/forward.hpp"

namespace moesaic::forward {

/// Every buffer of a forward. All paths have all of them, so that one size serves every path.
struct Scratch {
  float* logits = nullptr;            ///< [T, E]; the shared experts' gate later
  float* route = nullptr;             ///< Backend::route_scratch elements
  RoutingView routing;                ///< [T, top_k]
  BucketPlanView plan;                ///< for P pairs
  AlignedRoutingView aligned;         ///< capacity for every block size
  std::int32_t* pair_ids = nullptr;   ///< [P], with identity experts on the host
  std::int32_t* row_pairs = nullptr;  ///< [P], where rows of pairs come or go by themselves
  float* row_weights = nullptr;       ///< [P], with weights on the input
  float* normed = nullptr;            ///< [T, H], with an input norm
  float* latent = nullptr;            ///< [T, L], with latent experts
  float* latent_sum = nullptr;        ///< [T, L], their sum before it is projected up
  float* rows = nullptr;              ///< [P, H]: what the router reads, gathered x, rows of down
  float* gate_up = nullptr;           ///< [P, 2I] when the backend does not fuse the activation
  float* hidden = nullptr;            ///< [P, I]
  float* sum = nullptr;               ///< [T, H] f32, when several terms are added
  RoutingView token_routing;          ///< [T, 1], of what every token passes through
  std::byte* backend = nullptr;       ///< Backend::scratch_bytes
};

/// Lays out all slots; over Carver::counting() it only counts.
Scratch carve(const Context& context, const LayerRef& layer, std::int32_t top_k,
              std::int64_t num_tokens, Carver& carver);

/// Carves the workspace of a call and poisons it when asked. Throws WorkspaceError when it is too
/// small.
Scratch carve_workspace(const char* operation, Context& context, const LayerRef& layer,
                        std::int32_t top_k, std::int64_t num_tokens, Workspace& workspace);

}  // namespace moesaic::forward
