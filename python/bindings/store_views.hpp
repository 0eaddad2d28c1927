#pragma once

/// What Python sees of the experts in a store. Both keep the store alive.

#include <memory>

#include "moesaic/offload.hpp"

namespace moesaic::python {

struct StoreLayer {
  std::shared_ptr<MoeExpertStore> store;
  const LayerMoeWeights* weights;
};
struct StoreRole {
  std::shared_ptr<MoeExpertStore> store;
  RoleView view;
  const RoleWeights* weights;
};

}  // namespace moesaic::python
