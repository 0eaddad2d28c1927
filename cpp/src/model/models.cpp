#include "model/model_table.hpp"

namespace moesaic {

std::span<const Model> models() noexcept { return kModels; }

}  // namespace moesaic
