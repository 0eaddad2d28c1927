// The products for many tokens per expert: tiles of 64 tokens, fused outputs, and what they read.
#include "gemm/wide.cuh"

#include <gtest/gtest.h>

#include <algorithm>
#include <set>

#include "formats/decoders.cuh"
#include "gemm_run.hpp"

namespace moesaic::testing {
namespace {

constexpr std::int32_t kExperts = 3;

// Buckets of 70, 0 and 9 rows: tiles of 64 and 6, none, and 9. Sources and destinations are mixed.
Map uneven_buckets() {
  Map map("buckets", 79);
  map.offsets = {0, 70, 70, 79};
  map.facts.num_segments = kExperts;
  map.facts.source_divisor = 2;
  for (std::int32_t i = 0; i < 79; ++i) {
    map.source.push_back(i * 31 % 79);
    map.destination.push_back(i * 17 % 79);
  }
  return map;
}

Floats run(const PackedRole& role, const Map& map, const Input& in, std::uint64_t seed = 0) {
  return run_gemm(role.view(), role.ref, map, in, true, seed);
}

TEST(Wide, EveryFormatAndTypeOfX) {
  const Map map = uneven_buckets();
  for (const Format& format : formats_to_run()) {
    const std::int64_t cols = format.odd_cols();
    const TestRole role = make_format_role(format, kExperts, 37, cols, 3, true);
    const PackedRole packed = pack_role(role);
    for (const DType dtype : {DType::F32, DType::BF16}) {
      const Input in(40, cols, dtype, 5);
      EXPECT_LT(relative_error(run(packed, map, in), product_f64(role, map, in).values),
                kExactBound)
          << format.name << " " << name_of(dtype);
    }
  }
}

TEST(Wide, OneUnitAndManyRowBlocks) {
  for (const std::int64_t cols : {8, 64, 72, 320}) {
    const TestRole role = make_role(1, 131, cols, QuantType::BF16, 7, false);
    const PackedRole packed = pack_role(role);
    for (const std::int32_t tokens : {33, 64, 65}) {
      const Map map = single_map(tokens);
      const Input in(tokens, cols, DType::F16, 9);
      EXPECT_LT(relative_error(run(packed, map, in), product_f64(role, map, in).values),
                kExactBound)
          << cols << " columns, " << tokens << " tokens";
    }
  }
}

TEST(Wide, AlignedBlocksOf64) {
  Case c{};
  c.experts = 5;
  c.tokens = 90;
  c.top_k = 2;
  c.routing = RoutingShape::Skipped;
  const Map map = blocks_map(make_routing(c), c.experts, 64);
  const TestRole role = make_role(c.experts, 40, 96, QuantType::Q8_0, 11, true);
  const PackedRole packed = pack_role(role);
  const Input in(90, 96, DType::BF16, 13);
  EXPECT_LT(relative_error(run(packed, map, in), product_f64(role, map, in).values), kExactBound);
}

TEST(Wide, SchedulesAndNeighboursDoNotShow) {
  const Map map = uneven_buckets();
  for (const QuantType type : {QuantType::Q4_K, QuantType::Q6_K}) {
    const TestRole role = make_role(kExperts, 24, 512, type, 15, false);
    const PackedRole packed = pack_role(role);
    Input in(40, 512, DType::F32, 17);
    const Floats first = run(packed, map, in);
    for (const std::uint64_t seed : emulation::seeds()) {
      const Floats other = run(packed, map, in, seed);
      EXPECT_EQ(std::memcmp(other.data(), first.data(), first.size() * sizeof(float)), 0);
    }
    // Tokens in another order stand in other tiles, beside a token of NaN.
    Map turned = map;
    std::ranges::reverse(turned.source.begin(), turned.source.begin() + 70);
    std::ranges::reverse(turned.destination.begin(), turned.destination.begin() + 70);
    auto* const x = reinterpret_cast<float*>(in.bytes.data());
    const std::int32_t spoiled = map.source[3] / 2;
    std::fill_n(x + spoiled * 512, 512, kPoison);
    const Floats other = run(packed, turned, in);
    map.for_each(kExperts, [&](std::int32_t, std::int64_t from, std::int64_t to) {
      for (std::int64_t r = 0; r < 24; ++r) {
        const auto at = static_cast<std::size_t>(to * 24 + r);
        if (from == spoiled) {
          EXPECT_TRUE(std::isnan(other[at]));
        } else {
          ASSERT_EQ(other[at], first[at]);
        }
      }
    });
  }
}

TEST(Wide, MissingExpertsAreLeftAlone) {
  const Map map = uneven_buckets();
  const TestRole role = make_role(kExperts, 16, 64, QuantType::Q4_0, 19, false);
  const PackedRole packed = pack_role(role);
  const Input in(40, 64, DType::BF16, 21);
  RoleRef weight = packed.view();
  const std::int32_t slots[] = {-1, 0, 2};
  weight.ref.slot_map = slots;
  const Floats got = run_gemm(weight, packed.ref, map, in, true, 0);
  Doubles want = product_f64(role, map, in).values;
  map.for_each(kExperts, [&](std::int32_t e, std::int64_t, std::int64_t to) {
    if (e == 0) std::fill_n(want.begin() + to * 16, 16, std::nan(""));
  });
  EXPECT_LT(relative_error(got, want), kExactBound);
}

TEST(Wide, EachWeightByteOncePerTile) {
  const Map map = uneven_buckets();  // tiles of expert 0: 2, of expert 2: 1
  for (const QuantType type : {QuantType::Q4_K, QuantType::Q5_K, QuantType::Q2_K, QuantType::F16}) {
    const TestRole role = make_role(kExperts, 200, 256, type, 23, false);
    const PackedRole packed = pack_role(role);
    const cuda::PackedWeight w = cuda::packed_weight(packed.view().ref);
    const Input in(40, 256, DType::BF16, 25);
    emulation::counters() = {};
    run(packed, map, in);
    EXPECT_EQ(emulation::counters().weight_bytes,
              static_cast<std::uint64_t>(3 * w.row_blocks * w.code_block_bytes))
        << traits(type).name;
  }
}

// The lanes of one phase of a read meet different slots of the 128 bytes that the banks serve at once;
// and no two pieces of a row share a place.
template <class D, int kPlanes>
void expect_no_bank_conflicts() {
  using Loop = cuda::Wide<D, kPlanes>;
  constexpr int kBytes = 2 * D::kLaneCols;  // of a read
  constexpr int kLanes = 128 / kBytes;      // of a phase
  for (int first = 0; first < cuda::kWideTokens; first += kLanes / 4) {
    for (int run = 0; run < Loop::kRowBytes; run += 4 * kBytes) {
      std::set<int> slots;
      for (int lane = 0; lane < kLanes; ++lane) {
        const int row = first + lane / 4, byte = run + kBytes * (lane % 4);
        slots.insert((row * Loop::kRowBytes + 16 * Loop::swizzled(row, byte / 16) + byte % 16) %
                     128 / kBytes);
      }
      EXPECT_EQ(slots.size(), static_cast<std::size_t>(kLanes)) << "rows from " << first;
    }
  }
  for (const int row : {0, 1, 2, 3}) {
    std::set<int> places;
    for (int piece = 0; piece < Loop::kRowPieces; ++piece) {
      places.insert(Loop::swizzled(row, piece));
    }
    EXPECT_EQ(static_cast<int>(places.size()), Loop::kRowPieces);
    EXPECT_LT(*places.rbegin(), Loop::kRowPieces);
  }
}

TEST(Wide, SharedReadsMeetNoBankTwice) {
  expect_no_bank_conflicts<cuda::decoders::q4_k, 1>();
  expect_no_bank_conflicts<cuda::decoders::q4_k, 2>();
  expect_no_bank_conflicts<cuda::decoders::q6_k, 1>();
  expect_no_bank_conflicts<cuda::decoders::q6_k, 2>();
}

// Gate and up in shared units, activated in the epilogue; and either half alone.
TEST(Wide, FusedGateUp) {
  const Map map = uneven_buckets();
  for (const char* const name : {"q4_k", "int4_g64_zeros", "bf16"}) {
    const Format format = format_named(name);
    const Input in(40, format.odd_cols(), DType::F16, 29);
    for (const ActivationKind kind : {ActivationKind::SwiGlu, ActivationKind::SwiGluOai}) {
      const GateUp both(format, format, Units::Shared, kind, kExperts, 21, format.odd_cols());
      expect_near(both.run(map, in, true, 0), both.answer(map, in), kExactBound, name);
      if (kind != ActivationKind::SwiGlu) continue;
      expect_near(run(both.gate, map, in), product_f64(both.layer.gate, map, in), kExactBound,
                  name);
      expect_near(run(both.up, map, in), product_f64(both.layer.up, map, in), kExactBound, name);
    }
  }
}

// Rows that lie at multiples of 16 bytes are stored eight at a time, others one by one; the bits are
// the same.
TEST(Wide, RunsOfRowsAreStoredAsSingleOnesAre) {
  const Map map = uneven_buckets();
  const Format format = format_named("q8_0");
  const std::int64_t cols = format.odd_cols(), rows = 40;
  const GateUp both(format, format, Units::Shared, ActivationKind::SwiGlu, kExperts, rows, cols);
  const TestRole alone = make_format_role(format, kExperts, rows, cols, 31, true);
  const PackedRole packed = pack_role(alone);
  const Input in(40, cols, DType::BF16, 33);
  const Scratch scratch(map, 40, packed.ref, false);
  const Floats factors = random_values(79, 35);
  for (const DType dtype : {DType::F32, DType::F16, DType::BF16}) {
    const std::size_t size = size_of(dtype), bytes = static_cast<std::size_t>(79 * rows) * size;
    const auto stored = [&](bool in_runs, bool activated) {
      std::vector<std::byte> memory(bytes + 32, std::byte{0xFF});
      // Memory of a vector lies at a multiple of 16.
      std::byte* const out = memory.data() + (in_runs ? 16 : size);
      if (activated) {
        EXPECT_EQ(cuda::launch_gate_up({.gate = both.gate.view(),
                                        .up = both.up.view(),
                                        .activation = both.layer.activation,
                                        .map = map.view(),
                                        .in = in.rows,
                                        .hidden = out,
                                        .hidden_dtype = dtype,
                                        .row_weight = factors.data(),
                                        .scratch = scratch.data()},
                                       nullptr),
                  cuda::kOk);
      } else {
        EXPECT_EQ(cuda::launch_gemm({.weight = packed.view(),
                                     .map = map.view(),
                                     .in = in.rows,
                                     .out = out,
                                     .out_dtype = dtype,
                                     .scratch = scratch.data()},
                                    nullptr),
                  cuda::kOk);
      }
      // Nothing is written beside the rows.
      EXPECT_TRUE(
          std::all_of(memory.data(), out, [](std::byte b) { return b == std::byte{0xFF}; }));
      EXPECT_EQ(out[bytes], std::byte{0xFF});
      return std::vector<std::byte>(out, out + bytes);
    };
    for (const bool activated : {false, true}) {
      EXPECT_EQ(stored(true, activated), stored(false, activated)) << name_of(dtype);
    }
  }
}

}  // namespace
}  // namespace moesaic::testing
