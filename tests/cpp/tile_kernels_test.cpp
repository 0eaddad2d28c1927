// The kernels that multiply by tiles, on tiles in software and vectors in plain C++, so on every
// machine: each format beside the scalar twin, bit for bit, and beside f64.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "../emulation/amx/tiles.hpp"
#include "cpu/cpu_backend.hpp"
#include "cpu/dispatch.hpp"
#include "cpu/product.hpp"
#include "int4_role.hpp"
#include "layers.hpp"
// What is compiled for tiles in software and plain C++ comes last.
#include "cpu/kernels/scalar/simd.hpp"
namespace moesaic::cpu {
using emulation::Tiles;
}
#include "cpu/kernels/tile_table.hpp"

namespace moesaic::testing {
namespace {

constinit const cpu::TileKernels kTileKernels = cpu::make_tile_kernels();
const cpu::ProductKernels& twin() { return cpu::kernels_of(CpuIsa::Scalar).vectors; }

constexpr QuantType kTypes[] = {
#define MOESAIC_KERNEL(TYPE, NAME) QuantType::TYPE,
#include "cpu/kernels/kernels.inc"
#undef MOESAIC_KERNEL
};

/// As the CPU backend prepares a role.
RoleWeights repack(const RoleWeights& weights) {
  ExpertStack::Parts parts;
  parts.up = weights;
  cpu::CpuBackend().prepare(parts, {});
  return parts.up;
}

/// The rows of x as these kernels read them, bundle after bundle, in memory of just that size.
struct Bundles {
  int planes, tokens, size;
  std::vector<std::uint8_t> bytes;

  Bundles(const cpu::ProductKernels& kernels, const WeightRef& ref, const Floats& x, int of_planes)
      : planes(of_planes), tokens(static_cast<int>(x.size()) / static_cast<int>(ref.cols)) {
    const std::int64_t cols = cpu::kernel_cols(ref);
    const int most = kernels.bundle_tokens[planes];
    const int bundles = (tokens + most - 1) / most;
    size = (tokens + bundles - 1) / bundles;
    const std::int64_t token_bytes = cpu::activation_bytes(cols, planes);
    bytes.resize(static_cast<std::size_t>(tokens * token_bytes), 0xee);
    for (int t = 0; t < tokens; ++t) {
      const int first = t / size * size;
      kernels.quantize(x.data() + t * ref.cols, cpu::Source::F32, cols, planes, ref.int4.gather,
                       bytes.data() + first * token_bytes, std::min(size, tokens - first),
                       t - first);
    }
  }
};

/// [tokens, rows], by the kernel for the format.
Floats multiply(const cpu::ProductKernels& kernels, const WeightRef& ref, const Floats& x,
                int planes) {
  const Bundles bundles(kernels, ref, x, planes);
  cpu::PanelTask task;
  task.rows_layout = ref.layout == WeightLayout::Rows;
  task.row_stride = ref.row_stride;
  task.cols = cpu::kernel_cols(ref);
  task.activations = bundles.bytes.data();
  task.tokens = bundles.tokens;
  task.bundle = bundles.size;
  task.planes = planes;
  task.scale_cols = ref.int4.scale_cols;
  task.scale_f32 = ref.int4.scale_f32;
  task.zeros = ref.int4.zeros;
  Floats y(static_cast<std::size_t>(bundles.tokens * ref.rows));
  if (kernels.begin_job != nullptr) kernels.begin_job(ref.type, task);
  for (std::int64_t panel = 0; panel < cpu::panels_of(ref); ++panel) {
    Floats out = poisoned(bundles.tokens * cpu::kPanel);
    task.weights = cpu::panel_bytes(ref, 0, panel);
    task.rows = static_cast<int>(std::min(cpu::kPanel, ref.rows - panel * cpu::kPanel));
    task.out = out.data();
    kernels.gemm[static_cast<int>(ref.type)](task);
    for (int t = 0; t < bundles.tokens; ++t) {
      std::copy_n(out.begin() + t * cpu::kPanel, task.rows,
                  y.begin() + t * ref.rows + panel * cpu::kPanel);
    }
  }
  if (kernels.end_job != nullptr) kernels.end_job();
  EXPECT_FALSE(emulation::this_threads_tiles().configured()) << "tile state is left behind";
  return y;
}

Floats first_rows(const Floats& values, std::int64_t rows, std::int64_t cols) {
  return {values.begin(), values.begin() + rows * cols};
}

void expect_twin(const TestRole& role, const WeightRef& ref, const std::string& name) {
  const Floats x = random_values(64 * ref.cols, 3);
  Doubles exact;
  for (int t = 0; t < 8; ++t) {
    const Doubles row(x.begin() + t * ref.cols, x.begin() + (t + 1) * ref.cols);
    const Doubles y = apply_f64(role, 0, row.data());
    exact.insert(exact.end(), y.begin(), y.end());
  }
  for (const int planes : {1, 2}) {
    const Floats want = multiply(twin(), ref, x, planes);
    // Whole bundles, smaller last ones, and one token alone.
    for (const int tokens : {64, 33, 19, 16, 8, 5, 1}) {
      const Floats got = multiply(kTileKernels, ref, first_rows(x, tokens, ref.cols), planes);
      ASSERT_TRUE(same_bits(got, first_rows(want, tokens, ref.rows)))
          << name << " planes " << planes << " tokens " << tokens;
      if (tokens == 8) {
        EXPECT_LT(rel_l2(got, exact), planes == 2 ? 5e-5 : 8e-3) << name;
      }
    }
  }
}

TEST(TileKernels, EveryIntegerFormatHasTheBitsOfTheTwinAndMeetsF64) {
  for (const QuantType type : kTypes) {
    const int block = traits(type).block_elems;
    if (block == 1 || type == QuantType::E4M3) {  // floats
      EXPECT_EQ(kTileKernels.gemm[static_cast<int>(type)], nullptr);
      continue;
    }
    const std::int64_t cols = block == 256 ? 512 : block == 128 ? 384 : 320;
    const TestRole role = make_role(1, 19, cols, type, 4, false);
    expect_twin(role, repack(role.weights).ref, std::string(traits(type).name));
  }
}

TEST(TileKernels, RowsInsteadOfPanels) {
  const TestRole role = make_role(1, 19, 512, QuantType::Q6_K, 5, false);
  ASSERT_EQ(role.weights.ref.layout, WeightLayout::Rows);
  expect_twin(role, role.weights.ref, "rows");
}

TEST(TileKernels, EveryInt4Recipe) {
  for (const bool zeros : {false, true}) {
    for (const bool scale_f32 : {false, true}) {
      for (const auto order : {Int4Recipe::Plain, Int4Recipe::Shared}) {
        const Int4Recipe recipe{128, zeros, scale_f32, order};
        const TestRole role = make_int4_role(1, 24, 384, recipe, 6, false);
        expect_twin(role, role.weights.ref, "INT4");
      }
    }
  }
}

TEST(TileKernels, ExtremeWeightsAndActivationsDoNotOverflow) {
  for (const QuantType type : {QuantType::Q8_0, QuantType::IQ4_NL, QuantType::Q6_K}) {
    const TestRole role = make_role(1, 16, 512, type, 8, false);
    Floats x(17 * 512);
    for (std::size_t i = 0; i < x.size(); ++i) x[i] = i % 32 == 0 ? 32639.0F : -32639.0F;
    const RoleWeights packed = repack(role.weights);
    const WeightRef& ref = packed.ref;
    for (const int planes : {1, 2}) {
      EXPECT_TRUE(
          same_bits(multiply(kTileKernels, ref, x, planes), multiply(twin(), ref, x, planes)))
          << traits(type).name;
    }
  }
}

TEST(TileKernels, ATokenThatIsNotFiniteStaysAlone) {
  const TestRole role = make_role(1, 16, 256, QuantType::Q4_K, 9, false);
  const RoleWeights packed = repack(role.weights);
  const WeightRef& ref = packed.ref;
  const Floats clean = random_values(20 * 256, 10);
  Floats x = clean;
  x[3 * 256 + 17] = std::numeric_limits<float>::quiet_NaN();
  const Floats want = multiply(kTileKernels, ref, clean, 1),
               got = multiply(kTileKernels, ref, x, 1);
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (i / 16 == 3) {
      EXPECT_TRUE(std::isnan(got[i]));
    } else {
      EXPECT_EQ(got[i], want[i]);
    }
  }
}

TEST(TileKernels, CopiedTokensAreThoseThatWereQuantisedInPlace) {
  WeightRef ref;
  ref.cols = 320;
  const Floats x = random_values(16 * ref.cols, 11);
  for (const int planes : {1, 2}) {
    const Bundles want(kTileKernels, ref, x, planes);
    Bundles got = want;
    std::ranges::fill(got.bytes, std::uint8_t{0xee});
    const std::int64_t token_bytes = cpu::activation_bytes(ref.cols, planes);
    for (int t = 0; t < got.tokens; ++t) {
      std::vector<std::uint8_t> row(static_cast<std::size_t>(token_bytes));
      twin().quantize(x.data() + t * ref.cols, cpu::Source::F32, ref.cols, planes, nullptr,
                      row.data(), 1, 0);
      const int first = t / got.size * got.size;
      kTileKernels.copy_token(row.data(), ref.cols, planes, got.bytes.data() + first * token_bytes,
                              std::min(got.size, got.tokens - first), t - first);
    }
    EXPECT_EQ(got.bytes, want.bytes) << planes;
  }
}

}  // namespace
}  // namespace moesaic::testing
