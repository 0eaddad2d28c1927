#pragma once

/// What the loaders of expert stacks share.

#include <chrono>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "model/block_reader.hpp"
#include "moesaic/expert_stack.hpp"
#include "moesaic/gguf.hpp"

namespace moesaic::weights {

using Clock = std::chrono::steady_clock;

/// Tells the caller how far the load is. Throws OperationCancelled when it wants to stop.
void report_progress(const LoadOptions& options, std::int64_t done, std::int64_t total,
                     const std::string& what);

/// Notes how a role came into memory.
void record(LoadReport& report, Role role, const RoleWeights& weights, std::string source,
            std::string decision, std::string reason);

/// Gives the roles their biases and scales. Throws ShapeError for those of a gate that is not there;
/// check_parts counts the values.
void take_epilogues(const char* operation, ExpertStack::Parts& parts, Epilogues epilogues);

/// What `stack` is made of, to make a changed one of.
ExpertStack::Parts parts_of(const ExpertStack& stack);

/// Checks every role against the shape. Throws ShapeError or UnsupportedError naming the role.
void check_parts(const ExpertStack::Parts& parts);

/// Decodes every role to `type` (F32, F16 or BF16) in own memory.
void dequantize_roles(ExpertStack::Parts& parts, QuantType type, const LoadOptions& options);
/// Decodes one role to `type` in own memory.
void dequantize_role(RoleWeights& weights, QuantType type, const LoadOptions& options);

/// Throws for a load with a weight cache that could not use it: UnsupportedError for weights that
/// do not go to the CPU, ConfigError for decoded weights, or weights that stay as they are.
void check_weight_cache(const char* operation, const LoadOptions& options);

/// The end of every loader: check, dequantize when asked, let the backend prepare.
ExpertStack finish(ExpertStack::Parts parts, const LoadOptions& options, Clock::time_point start);

/// The experts that a stack keeps of a model's.
struct KeptExperts {
  std::int32_t num_experts = 0;   ///< of the model
  std::vector<std::int32_t> ids;  ///< in the model; ascending, and maybe none

  std::int32_t count() const { return static_cast<std::int32_t>(ids.size()); }
};

/// The ids in order. Throws ShapeError for one that is not there or named twice.
KeptExperts keep_experts(const char* operation, std::vector<std::int32_t> ids,
                         std::int32_t num_experts);

/// Values [E, width] of the experts that are kept; null stays null.
std::shared_ptr<const std::vector<float>> values_of_kept(
    const std::shared_ptr<const std::vector<float>>& values, std::int64_t width,
    const KeptExperts& kept);

/// finish() for parts that hold the experts of `kept` alone, in its order: a stack in which they go
/// by their ids in the model. Throws UnsupportedError for weights on a device, whose slots would be
/// looked up there.
ExpertStack finish_kept(ExpertStack::Parts parts, const KeptExperts& kept,
                        const LoadOptions& options, Clock::time_point start);

/// "[5, 32, 64]".
std::string shape_text(std::span<const std::int64_t> shape);

/// Throws FormatError unless the tensor has this shape.
void check_shape(const GgufTensor& tensor, std::initializer_list<std::int64_t> shape,
                 const char* operation = "load_from_gguf");

/// Decodes a whole tensor to f32. Throws FormatError unless it has this shape.
std::vector<float> decode_tensor(const BlockReader& block, const GgufTensor& tensor,
                                 std::initializer_list<std::int64_t> shape);

/// A tensor of i32. Throws FormatError unless it has this shape and type.
std::vector<std::int32_t> read_ids(const BlockReader& block, const GgufTensor& tensor,
                                   std::initializer_list<std::int64_t> shape);

/// The projections of latent experts (LatentExperts) as a stack of one ungated expert.
ExpertStack load_latent_projections(const BlockReader& block, const MoeTensors& tensors,
                                    const LoadOptions& options);

/// The shared experts of one layer as a stack of one expert; gate and up may be one tensor, gate
/// rows first. What they give is multiplied by `factor`.
ExpertStack load_shared_experts(const BlockReader& block, const MoeTensors& tensors, float factor,
                                const LoadOptions& options);

/// `stack` whose down role gives `factor` times as much: scale, bias and low-rank delta. Throws
/// UnsupportedError for a stack on a device.
ExpertStack scale_result(const ExpertStack& stack, float factor);

}  // namespace moesaic::weights
