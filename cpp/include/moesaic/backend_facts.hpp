#pragma once

/// What backends say of themselves and are asked about, and the way from tensors to the rows that
/// operations read and write.

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "moesaic/expert_stack.hpp"
#include "moesaic/operands.hpp"
#include "moesaic/plan.hpp"
#include "moesaic/tuning.hpp"
#include "moesaic/types.hpp"

namespace moesaic {

/// The rows of a view whose last dimension is contiguous (or of size 1): one of rank 1, dim(0) of
/// rank 2, dim(0) * dim(1) of rank 3. The type is f32, f16 or bf16.
InputRows input_rows(const ConstTensorView& view);
/// The rows of a rank-2 view; the last dimension is contiguous.
OutputRows output_rows(const TensorView& view);
/// `num_rows` rows of `cols` elements, one behind the other.
InputRows dense_rows(const void* data, DType dtype, std::int64_t num_rows, std::int64_t cols);

/// Sizes that scratch depends on.
struct ScratchQuery {
  StackShape shape;
  std::int64_t num_tokens = 0;
  std::int32_t top_k = 0;
  std::int64_t num_pairs = 0;    ///< rows of the larger of the two phases
  std::int64_t packed_cols = 0;  ///< widest INT4 role (Int4Format); can exceed H and I
  bool shared_units = false;     ///< gate and up lie together (UnitHalf), or one role runs alone
  std::int64_t low_rank = 0;     ///< ExpertStack::low_rank
};

/// What a layer may have beyond routed and shared experts.
enum class LayerPart : std::uint8_t {
  InputWeights,     ///< router weights on the experts' input
  IdentityExperts,  ///< ids that pass x through
  GivenIds,         ///< ids from a table or the caller, weights from the router
  Norms,            ///< RMS norms of the inputs or of the latent sum
  LatentExperts,    ///< projections around the experts
  LowRankDeltas,    ///< low-rank terms beside the weights
};

/// Bytes of an array that a layer holds in host memory.
using HostValues = std::span<const std::byte>;
template <class T>
HostValues host_values(const std::vector<T>& values) {
  return std::as_bytes(std::span(values));
}

/// Memory behind a handle, which launches may use while `keep` lives.
struct SharedHandle {
  void* data = nullptr;
  std::size_t bytes = 0;
  std::shared_ptr<const void> keep;
};

/// Asked on every forward, so it allocates nothing.
struct Support {
  bool ok = true;
  std::string_view reason;  ///< why not, or which slower way is taken; lives as long as the backend
};

struct BackendInfo {
  std::string name;  ///< "cpu", "cuda", "metal"
  bool available = true;
  std::string reason;  ///< why it is not
  std::vector<Device> devices;
  std::string detail;  ///< e.g. "avx512vnni (forced by MOESAIC_CPU_ISA)"
};

/// One kernel as listed by `info`, tests and bench.
struct KernelInfo {
  std::string operation;  ///< "expert_gemm"
  QuantType type;
  WeightLayout layout;
  std::string isa;
  std::string name;  ///< mechanical: gemm_q4_k_avx512vnni
};

}  // namespace moesaic
