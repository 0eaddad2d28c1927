#pragma once

/// Named views into the caller's workspace.

#include <cstddef>
#include <cstdint>

#include "moesaic/forward.hpp"

namespace moesaic::forward {

/// Every buffer of a forward. The same on all paths, so that one size serves them all.
struct Scratch {
  float* logits = nullptr;       ///< [T, E]; the shared experts' gate later
  float* route = nullptr;        ///< route_scratch_elems per thread
  RoutingView routing;           ///< [T, top_k]
  BucketPlanView plan;           ///< of P pairs
  AlignedRoutingView aligned;    ///< capacity for every block size
  float* rows = nullptr;         ///< [P, H]: gathered x, then the rows of down
  float* gate_up = nullptr;      ///< [P, 2I] when the backend does not fuse the activation
  float* hidden = nullptr;       ///< [P, I]
  float* sum = nullptr;          ///< [T, H] f32, when shared experts are added
  RoutingView shared_routing;    ///< [T, 1]
  std::byte* backend = nullptr;  ///< Backend::scratch_bytes
};

/// Lays out all slots; over Carver::counting() it only counts.
Scratch carve(const Context& context, const LayerRef& layer, std::int32_t top_k,
              std::int64_t num_tokens, Carver& carver);

/// Carves the workspace of a call and poisons it when asked. Throws WorkspaceError when it is too
/// small.
Scratch carve_workspace(const char* operation, const Context& context, const LayerRef& layer,
                        std::int32_t top_k, std::int64_t num_tokens, Workspace& workspace);

}  // namespace moesaic::forward
