#pragma once

/// Hugging Face checkpoints, which Python reads: what comes of a load.

#include <memory>

#include "bindings.hpp"
#include "load.hpp"
#include "offload/checkpoint.hpp"

namespace moesaic::python {

/// A function or class of moesaic.safetensors.
py::object checkpoint_loader(const char* name);

/// The stack of what Python gathered: a StackBuilder, or the Marlin stacks of gate_up and down with
/// the number of experts of the model and those that the stacks have, None for all.
std::shared_ptr<ExpertStack> finish_gathered(Loading& loading, const char* operation,
                                             const py::handle& gathered);

/// What a moesaic.safetensors.CheckpointExperts describes.
offload::StoredExperts import_stored_experts(const py::object& experts);

/// The CheckpointExperts that a store was made of, or None.
py::object checkpoint_of(const std::shared_ptr<MoeExpertStore>& store);

}  // namespace moesaic::python
