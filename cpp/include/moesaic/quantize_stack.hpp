#pragma once

/// Expert stacks of dense matrices that are encoded on the way.

#include "moesaic/edit.hpp"

namespace moesaic {

/// ExpertStack::from_dense_stacks with roles encoded in `types`, expert after expert on the pool of
/// `options`, so that no more than one expert takes memory beside the result. The report says what
/// was encoded. Errors: as from_dense_stacks and quantize_rows (moesaic/quantize.hpp), with role
/// and expert in the message.
ExpertStack quantize_dense_stacks(const ConstTensorView& gate, const ConstTensorView& up,
                                  const ConstTensorView& down, const RoleTypes& types,
                                  const LoadOptions& options = {}, Epilogues epilogues = {});

}  // namespace moesaic
