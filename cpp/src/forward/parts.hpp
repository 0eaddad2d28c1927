#pragma once

/// Which of the rarer parts a layer has.

#include "moesaic/backend.hpp"
#include "moesaic/forward.hpp"

namespace moesaic::forward {

inline constexpr LayerPart kLayerParts[] = {LayerPart::InputWeights,  LayerPart::IdentityExperts,
                                            LayerPart::GivenIds,      LayerPart::Norms,
                                            LayerPart::LatentExperts, LayerPart::LowRankDeltas};

bool has_norm(const RmsNorm* norm);
bool has_part(const LayerRef& layer, LayerPart part);

}  // namespace moesaic::forward
