#pragma once

/// Which kernel a call runs, with which grid, threads, function constants and arguments. Plain C++:
/// everything that can be wrong here is tested without a GPU.

#include <array>
#include <compare>
#include <cstdint>
#include <string_view>

#include "metal/arguments.h"
#include "moesaic/backend.hpp"

namespace moesaic::metal {

enum class Kernel : std::uint8_t {
#define MOESAIC_METAL_KERNEL(name) name,
#include "metal/kernels.inc"
};
std::string_view name_of(Kernel kernel) noexcept;

/// Values of the function constants; 0 where a kernel does not read one.
struct Constants {
  std::int32_t input = 0;
  std::int32_t output = 0;
  std::int32_t activation = 0;
  std::int32_t tile = 0;
  auto operator<=>(const Constants&) const = default;
};

struct DispatchShape {
  Kernel kernel;
  Constants constants{};
  std::array<std::uint32_t, 3> groups{1, 1, 1};  ///< an indirect grid replaces them
  std::uint32_t threads = metal_args::kSimdWidth;
  /// A grid without threadgroups must not be dispatched.
  bool empty() const { return groups[0] == 0 || groups[1] == 0 || groups[2] == 0; }
};

/// How a grouped product runs.
enum class Product : std::uint8_t {
  Gemv,          ///< few rows per segment: the weights are read for each
  GemmDirect,    ///< tiles of segments whose width is known
  GemmIndirect,  ///< tiles that gemm_tiles lists on the device
};
/// Rows per segment, on average, from which tiles pay: what instructions say (README.md), not measured
/// on hardware.
inline constexpr std::int32_t kGemmMinRows = 5;
Product choose_product(const RowMap& map);
/// Entries of a tile: 8, 16 or 32, the narrowest that holds a segment of average width, since columns
/// without an entry cost as much as others.
std::int32_t tile_cols(const RowMap& map);

/// Column tiles of a segment of known width.
std::int32_t tiles_per_segment(const RowMap& map);
/// Gate and up in one kernel: few rows per segment, both roles alike.
bool fuses_gate_up(const op::GateUp& call);

/// Formats that the expert kernels decode.
bool has_kernels(QuantType type);
/// How these kernels want a type to lie: in rows, but for INT4, which they read from the host's panels.
WeightLayout kernel_layout(QuantType type);
enum class ExpertLoop : std::uint8_t { Gemv, GateUp, Gemm, GemmHalf };
/// `type` must have kernels.
Kernel expert_kernel(QuantType type, ExpertLoop loop);
/// The loop of a product: half tiles for Precision::Fast.
ExpertLoop loop_of(Product product, Precision precision);

/// Bytes for the indirect grid and for the tiles that gemm_tiles lists of a map with this limit,
/// however many its segments are: no tile is empty.
std::size_t tile_scratch_bytes(std::int64_t limit);
/// The tiles lie behind the grid.
inline constexpr std::size_t kTileListOffset = 64;

std::int32_t input_constant(DType dtype);

metal_args::RowMapArgs row_map_args(const RowMap& map);
metal_args::InputArgs input_args(const InputRows& rows);
metal_args::ActivationArgs activation_args(const Activation& activation);
/// `base`: byte of expert 0 in the bound buffer. Throws UnsupportedError for rows of 4 GiB.
metal_args::WeightArgs weight_args(const RoleRef& weight, std::uint64_t base);
metal_args::RouteArgs route_args(const op::Route& call, bool report_nonfinite);

/// Throws UnsupportedError for a router beyond the limits of `route`.
void check_route(const RouterRules& router);

DispatchShape router_logits_shape(const InputRows& x, std::int32_t num_experts);
DispatchShape route_shape(std::int64_t num_tokens);
DispatchShape bucket_plan_shape(std::int32_t num_experts);
DispatchShape align_shape(std::int32_t num_experts);
DispatchShape gather_shape(const InputRows& x, std::int64_t rows);
DispatchShape activate_shape(const op::Activate& call);
DispatchShape combine_shape(const op::Combine& call);
DispatchShape shared_routing_shape(std::int64_t num_tokens);
DispatchShape zero_skipped_shape(std::int64_t rows);
DispatchShape words_shape(Kernel kernel, std::int64_t words);
DispatchShape gemm_tiles_shape(const RowMap& map);
/// One role, by its own loop.
DispatchShape expert_shape(const op::Gemm& call, Product product);
DispatchShape gate_up_shape(const op::GateUp& call);

}  // namespace moesaic::metal
