#include "forward/parts.hpp"

namespace moesaic {

namespace forward {

bool has_norm(const RmsNorm* norm) { return norm != nullptr && *norm; }

bool has_part(const LayerRef& layer, LayerPart part) {
  const RouterConfig* const router = layer.router;
  switch (part) {
    case LayerPart::InputWeights:
      return layer.weight_on() == WeightOn::Input;
    case LayerPart::IdentityExperts:
      return router != nullptr && router->identity_experts > 0;
    case LayerPart::GivenIds:
      return router != nullptr && router->select_on == SelectOn::Given;
    case LayerPart::Norms:
      return has_norm(layer.input_norm) || has_norm(layer.router_norm) ||
             (layer.latent != nullptr && layer.latent->norm);
    case LayerPart::LatentExperts:
      return layer.latent != nullptr;
    case LayerPart::LowRankDeltas:
      return layer.stack->low_rank() > 0 ||
             (layer.shared != nullptr && layer.shared->stack.low_rank() > 0) ||
             (layer.latent != nullptr && layer.latent->projections.low_rank() > 0);
  }
  return false;
}

}  // namespace forward
}  // namespace moesaic
