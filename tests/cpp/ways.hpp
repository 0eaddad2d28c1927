#pragma once

/// The ways through a forward, so that tests can take each of them.

#include "moesaic/forward.hpp"

namespace moesaic::testing {

struct Way {
  const char* name;
  bool forced;  ///< moe_forward_bucketed with these modes, in place of moe_forward
  GemmMode gemm;
  RowSpaceMode row_space;
};
inline constexpr Way kWays[] = {
    {"auto", false, GemmMode::Auto, RowSpaceMode::Auto},
    {"bucketed_pairs", true, GemmMode::Bucketed, RowSpaceMode::TokenPairs},
    {"bucketed_packed", true, GemmMode::Bucketed, RowSpaceMode::PackedRows},
    {"aligned_pairs", true, GemmMode::Aligned, RowSpaceMode::TokenPairs},
    {"aligned_packed", true, GemmMode::Aligned, RowSpaceMode::PackedRows},
};

/// The forward on this way, into the output of `io`.
inline void forward(Context& context, const LayerRef& layer, const ForwardIo& io,
                    Workspace& workspace, const Way& way = kWays[0]) {
  if (way.forced) {
    moe_forward_bucketed(context, layer, io, workspace, way.gemm, way.row_space);
  } else {
    moe_forward(context, layer, io, workspace);
  }
}

}  // namespace moesaic::testing
