#pragma once

/// Encoding and decoding of whole arrays, with importances and over threads.

#include <cstddef>
#include <cstdint>

#include "moesaic/quant.hpp"
#include "moesaic/types.hpp"

namespace moesaic {

class ThreadPool;

/// Whether the encoder of the type takes an importance matrix, as ggml's does.
bool takes_importance(QuantType type) noexcept;

/// quantize_row (moesaic/quant.hpp) with `importance` [cols]: what the squared error of each value
/// counts, 0 or more, such as the mean square of the activation that meets it. Also
/// UnsupportedError for a type that takes none.
void quantize_row(QuantType type, const float* values, std::byte* row, std::int64_t cols,
                  const float* importance);

/// Encodes `values` [..., cols] of f32, f16 or bf16 over the threads of `pool`, into rows that lie
/// one behind the other. `importance` (no data: none) is f32; where it has fewer dimensions or
/// sizes of 1 it repeats, as in numpy, but for the last. The bytes depend neither on the threads
/// nor on the processor. Errors: as quantize_row, with the position in the message and `out`
/// incomplete; DTypeError.
void quantize_rows(QuantType type, const ConstTensorView& values, const ConstTensorView& importance,
                   std::byte* out, ThreadPool& pool);

/// Decodes rows that lie one behind the other over the threads of `pool`. Errors: as
/// dequantize_row.
void dequantize_rows(QuantType type, const std::byte* data, std::int64_t rows, std::int64_t cols,
                     float* out, ThreadPool& pool);

}  // namespace moesaic
