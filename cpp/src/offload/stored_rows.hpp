#pragma once

/// Rows of GGUF types from the matrices of checkpoints, bit for bit as a load makes them
/// (moesaic/safetensors: dense.py, fp8.py, fp4.py, int_blocks.py).

#include <cstddef>
#include <cstdint>

#include "offload/checkpoint.hpp"

namespace moesaic::offload {

/// Bytes of each tensor that a role of `rows` x `cols` is made of; 0 for one that its form lacks.
struct StoredBytes {
  std::int64_t values = 0, scales = 0, zeros = 0;
};
StoredBytes stored_bytes(const StoredRole& role, std::int64_t rows, std::int64_t cols);

/// Writes `rows` rows of row_bytes(role.type, cols) bytes. `name` is that of the tensors in errors.
/// Errors: FormatError for values that no number is, as the load of a whole layer has them.
void decode_rows(const StoredRole& role, std::int64_t rows, std::int64_t cols,
                 const std::byte* values, const std::byte* scales, const std::string& name,
                 std::byte* to);

}  // namespace moesaic::offload
