#pragma once

/// The parts of a layer fit each other: for a MoeLayer when it is made, for loose parts in every
/// call. Each function throws a ShapeError that names the operation and the part.

#include "moesaic/layer.hpp"

namespace moesaic::weights {

/// The stack has a gate role exactly when the activation reads one.
void check_gate(const char* operation, const char* name, const ExpertStack& stack,
                const Activation& activation);
/// `norm` is empty or has `size` weights.
void check_norm(const char* operation, const char* name, const RmsNorm& norm, std::int64_t size);
/// One expert of hidden size `hidden`, with a gate of that size or none.
void check_shared(const char* operation, const SharedExperts& shared, std::int64_t hidden);
/// Projections between the width of `experts` and their own hidden size, a norm of that width.
void check_latent(const char* operation, const LatentExperts& latent, const StackShape& experts);

}  // namespace moesaic::weights
