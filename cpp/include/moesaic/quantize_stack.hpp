#pragma once

/// Expert stacks of dense matrices that are encoded on the way.

#include "moesaic/edit.hpp"

namespace moesaic {

/// The importances of each role's values (moesaic/quantize.hpp), f32 with the elements of a row one
/// behind the other: [cols] for all experts, [E, cols] for each, or [E, rows, cols], where E and
/// rows may be 1. No data: none.
struct RoleImportances {
  ConstTensorView gate, up, down;
};

/// ExpertStack::from_dense_stacks with roles encoded in `types`, expert after expert on the pool of
/// `options`, so that no more than one expert takes memory beside the result. The report says what
/// was encoded. Errors: as from_dense_stacks and quantize_rows (moesaic/quantize.hpp), with role
/// and expert in the message; before anything is encoded, ConfigError for importances of a role
/// that is not, UnsupportedError for a type that takes none, ShapeError for other sizes.
ExpertStack quantize_dense_stacks(const ConstTensorView& gate, const ConstTensorView& up,
                                  const ConstTensorView& down, const RoleTypes& types,
                                  const LoadOptions& options = {}, Epilogues epilogues = {},
                                  const RoleImportances& importances = {});

}  // namespace moesaic
