#pragma once

/// Weights on their way to the device: repacked expert by expert (cuda/formats), uploaded, with
/// their epilogues.

#include <memory>

#include "cuda/backend/device.hpp"
#include "moesaic/expert_stack.hpp"

namespace moesaic::cuda {

/// Replaces every role by its packed form on the device. Memory keeps `gpu` alive. Errors:
/// UnsupportedError naming the role and type, OutOfMemoryError, OperationCancelled; then `parts` is
/// as it was.
void prepare(const std::shared_ptr<const Gpu>& gpu, ExpertStack::Parts& parts,
             const LoadOptions& options);

}  // namespace moesaic::cuda
