#pragma once

/// Tensors of a GGUF file as the roles of a stack, without a copy.

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/block_reader.hpp"
#include "weights/load.hpp"

namespace moesaic::weights {

/// Rows [first_row, first_row + rows) of each [total_rows, cols] matrix in a stacked tensor; with
/// `kept` of those matrices alone, behind a pointer table, and nothing else is read.
/// Throws UnsupportedError for a type without a decoder, FormatError when the tensor is too small.
RoleWeights stacked_role(const BlockReader& block, const GgufTensor& tensor, std::int64_t experts,
                         std::int64_t total_rows, std::int64_t first_row, std::int64_t rows,
                         std::int64_t cols, const KeptExperts* kept = nullptr);

/// The [rows, cols] matrices of one role, one tensor per expert, behind a pointer table; with `kept`
/// only those are read. Throws FormatError when they differ in shape or type.
RoleWeights per_expert_role(const BlockReader& block, std::span<const GgufTensor* const> tensors,
                            std::int64_t rows, std::int64_t cols,
                            const KeptExperts* kept = nullptr);

/// A [rows, cols] tensor as a stack of one matrix. Throws FormatError unless it has this shape.
RoleWeights single_role(const BlockReader& block, const GgufTensor& tensor, std::int64_t rows,
                        std::int64_t cols);

/// Where the rows of stacked_role are; null for a file that is not mapped.
std::shared_ptr<const WeightOrigin> origin_of(const BlockReader& block, const GgufTensor& tensor,
                                              std::int64_t first_row, std::int64_t rows,
                                              const KeptExperts* kept = nullptr);

/// Throws as weights::check_weight_cache, and ConfigError for a file that is not mapped.
void check_weight_cache(const char* operation, const GgufFile& file, const LoadOptions& options);

/// The one factor of a matrix, by a tensor [1] or null, times `factor`; null for 1.
std::shared_ptr<const std::vector<float>> single_scale(const BlockReader& block,
                                                       const GgufTensor* tensor,
                                                       float factor = 1.0F);

/// The names of the tensors that the roles of a stack come from.
struct Sources {
  std::string gate, up, down;
};

/// Notes in the report where each role came from, and tells the caller's progress callback.
void record_roles(const BlockReader& block, ExpertStack::Parts& parts, const Sources& sources,
                  const LoadOptions& options);

}  // namespace moesaic::weights
