// Products of every weight format on the emulated device against f64 on the decoded weights.
#include "gemm_run.hpp"

namespace moesaic::testing {
namespace {

TEST(GemmFormats, EveryFormatAgreesWithF64) {
  constexpr std::int32_t kExperts = 3;
  const Routing routing = routing_of(kExperts, 5, 2, RoutingShape::Skipped);
  for (const Format& format : formats_to_run()) {
    const std::int64_t cols = format.odd_cols();
    const TestRole role = make_format_role(format, kExperts, 37, cols, 11, true);
    const PackedRole packed = pack_role(role);
    for (const Map& map : {buckets_map(routing, kExperts), pairs_map(routing)}) {
      const Input in(5, cols, DType::F32, 21);
      const Answer want = product_f64(role, map, in);
      for (const bool exact : {true, false}) {
        const Floats got = run_gemm(packed.view(), packed.ref, map, in, exact, 0);
        expect_near(got, want, exact ? kExactBound : kFastBound,
                    format.name + " " + map.name + (exact ? " exact" : " fast"));
      }
    }
  }
}

TEST(GemmFormats, EveryFormatFusesGateAndUp) {
  constexpr std::int32_t kExperts = 3;
  const Routing routing = routing_of(kExperts, 6, 2, RoutingShape::EmptyExperts);
  for (const Format& format : formats_to_run()) {
    const std::int64_t cols = format.odd_cols();
    const GateUp layer(format, format, Units::Shared, ActivationKind::SwiGlu, kExperts, 21, cols);
    const Map map = buckets_map(routing, kExperts);
    const Input in(6, cols, DType::F32, 22);
    const Answer want = layer.answer(map, in);
    for (const bool exact : {true, false}) {
      expect_near(layer.run(map, in, exact, 0), want, exact ? kExactBound : kFusedFastBound,
                  format.name + (exact ? " exact" : " fast"));
    }
  }
}

TEST(GemmFormats, EveryActivationOfSharedSeparateAndLoneUnits) {
  const Format q4 = format_named("q4_k"), q6 = format_named("q6_k");
  const Routing routing = routing_of(2, 3, 2, RoutingShape::Skipped);
  const Map map = pairs_map(routing);
  const Input in(3, 256, DType::F32, 23);
  for (int k = 0; k <= static_cast<int>(ActivationKind::SiTu); ++k) {
    const auto kind = static_cast<ActivationKind>(k);
    Activation activation;
    activation.kind = kind;
    for (const Units units : {Units::Shared, Units::Separate, Units::Ungated}) {
      if (activation.gated() == (units == Units::Ungated)) continue;
      const GateUp layer(units == Units::Shared ? q6 : q4, q6, units, kind, 2, 24, 256);
      expect_near(layer.run(map, in, true, 0), layer.answer(map, in), kExactBound,
                  std::string(name_of(kind)) + " " + std::to_string(static_cast<int>(units)));
    }
  }
}

TEST(GemmFormats, RowWeightsScaleTheProductsBeforeScaleAndBias) {
  const Routing routing = routing_of(3, 21, 2, RoutingShape::Zipf);
  const Format q4 = format_named("q4_k"), q8 = format_named("q8_0");
  for (const Units units : {Units::Shared, Units::Separate, Units::Ungated}) {
    const ActivationKind kind =
        units == Units::Ungated ? ActivationKind::ReluSquared : ActivationKind::SwiGlu;
    const GateUp layer(units == Units::Shared ? q8 : q4, q8, units, kind, 3, 27, 256);
    const Input in(21, 256, DType::F32, 24);
    for (const Map& map :
         {pairs_map(routing), buckets_map(routing, 3), blocks_map(routing, 3, 8)}) {
      Floats factors = random_values(map.facts.limit, 25);
      factors[1] = 0.0F;
      for (const std::uint64_t seed : emulation::seeds()) {
        expect_near(layer.run(map, in, true, seed, factors), layer.answer(map, in, factors),
                    kExactBound, map.name);
      }
      expect_same_bits(layer.run(map, in, true, 0, Floats(factors.size(), 1.0F)),
                       layer.run(map, in, true, 0), map.name + ", factors of 1");
    }
  }
}

TEST(GemmFormats, ARoleOfSharedUnitsRunsAlone) {
  const Routing routing = routing_of(3, 4, 2, RoutingShape::Uniform);
  const Map map = buckets_map(routing, 3);
  for (const char* name : {"q5_k", "q8_0", "int4_g64_zeros"}) {
    const Format format = format_named(name);
    const std::int64_t cols = format.odd_cols();
    const GateUp layer(format, format, Units::Shared, ActivationKind::SwiGlu, 3, 27, cols);
    const Input in(4, cols, DType::F32, 24);
    expect_near(run_gemm(layer.gate.view(), layer.gate.ref, map, in, true, 0),
                product_f64(layer.layer.gate, map, in), kExactBound, format.name + " gate");
    expect_near(run_gemm(layer.up.view(), layer.up.ref, map, in, true, 0),
                product_f64(layer.layer.up, map, in), kExactBound, format.name + " up");
  }
}

TEST(GemmFormats, OffsetsOfXCostNoPrecision) {
  // All of one sign: what the fragments hold in excess of the codes must cancel.
  const Routing routing = routing_of(2, 4, 2, RoutingShape::Uniform);
  for (const char* name : {"q2_k", "q4_k", "q6_k", "int4_g128"}) {
    const Format format = format_named(name);
    const std::int64_t cols = 512;
    const TestRole role = make_format_role(format, 2, 16, cols, 36, false);
    const PackedRole packed = pack_role(role);
    Input in(4, cols, DType::F32, 37);
    for (float& v : in.values) v += 6.0F;
    in.rows.data = in.values.data();
    const Map map = pairs_map(routing);
    const Answer want = product_f64(role, map, in);
    const Floats got = run_gemm(packed.view(), packed.ref, map, in, true, 0);
    EXPECT_LT(largest_error(got, want.values, want.magnitude), kExactBound) << format.name;
  }
}

TEST(GemmFormats, SixteenBitInputsAreExactAndOutputsRound) {
  const Format format = format_named("int4_g32_order");
  const TestRole role = make_format_role(format, 2, 40, 200, 15, true);
  const PackedRole packed = pack_role(role);
  const Map map = pairs_map(routing_of(2, 4, 2, RoutingShape::Uniform));
  for (const DType dtype : {DType::F16, DType::BF16}) {
    const Input in(4, 200, dtype, 28);
    const Answer want = product_f64(role, map, in);
    const Floats exact = run_gemm(packed.view(), packed.ref, map, in, true, 0);
    expect_near(exact, want, kRoundedBound, name_of(dtype));
    const Floats fast = run_gemm(packed.view(), packed.ref, map, in, false, 0);
    expect_same_bits(exact, fast, name_of(dtype));

    std::vector<std::uint16_t> halves(exact.size());
    const Scratch scratch(map, 4, packed.ref, false);
    const bool f16 = dtype == DType::F16;
    ASSERT_EQ(cuda::launch_gemm({.weight = packed.view(),
                                 .map = map.view(),
                                 .in = in.rows,
                                 .out = halves.data(),
                                 .out_dtype = dtype,
                                 .scratch = scratch.data()},
                                nullptr),
              cuda::kOk);
    for (std::size_t i = 0; i < halves.size(); ++i) {
      ASSERT_EQ(halves[i], f16 ? f32_to_f16(exact[i]) : f32_to_bf16(exact[i]));
    }
  }
}

TEST(GemmFormats, RowsOfWholeUnitsAreReadAsTheyCome) {
  // Rows that are not aligned are copied, with the same result.
  for (const Format& format : formats_to_run()) {
    const std::int64_t cols = std::max<std::int64_t>(format.cols_step, 128);
    const TestRole role = make_format_role(format, 3, 37, cols, 19, true);
    const PackedRole packed = pack_role(role);
    const Map map = buckets_map(routing_of(3, 23, 2, RoutingShape::Zipf), 3);
    const Input in(23, cols, DType::BF16, 32);
    std::vector<std::byte> moved(in.bytes.size() + 2);
    std::copy(in.bytes.begin(), in.bytes.end(), moved.begin() + 2);
    Input copied = in;
    copied.rows.data = moved.data() + 2;
    for (const bool narrow : {false, true}) {
      emulation::counters() = {};
      const Floats direct = run_gemm(packed.view(), packed.ref, map, in, true, 0, narrow);
      const std::uint64_t launches = emulation::counters().launches;
      emulation::counters() = {};
      expect_same_bits(direct, run_gemm(packed.view(), packed.ref, map, copied, true, 0, narrow),
                       format.name);
      // Sums of x for minima and offsets are staged either way, as are columns in another order.
      const bool sums = format.name == "q4_k" || format.name == "q5_k" ||
                        (!narrow && (format.name == "q4_1" || format.name == "q5_1" ||
                                     format.name == "q2_k" || format.int4.zeros));
      const bool ordered = format.int4.order != Int4Recipe{}.order;
      EXPECT_EQ(launches + (sums || ordered ? 0 : 1), emulation::counters().launches)
          << format.name;
    }
  }
}

TEST(GemmFormats, WeightsAreReadOncePerTile) {
  for (const Format& format : formats_to_run()) {
    const TestRole role = make_format_role(format, 3, 37, format.odd_cols(), 18, false);
    const PackedRole packed = pack_role(role);
    // 20 rows of expert 0, 3 of expert 2: tiles of 64, or of 8 where bits must not change.
    Routing routing(23, 1);
    for (int t = 0; t < 23; ++t) routing.topk_ids()[static_cast<std::size_t>(t)] = t < 20 ? 0 : 2;
    const Input in(23, format.odd_cols(), DType::F32, 31);
    const std::int64_t row_blocks = (37 + 15) / 16;
    for (const bool narrow : {false, true}) {
      const std::int64_t tiles = narrow ? 3 + 1 : 2;
      emulation::counters() = {};
      run_gemm(packed.view(), packed.ref, buckets_map(routing, 3), in, false, 0, narrow);
      EXPECT_EQ(emulation::counters().weight_bytes,
                static_cast<std::uint64_t>(tiles * row_blocks * packed.ref.row_stride))
          << format.name << (narrow ? " narrow" : " wide");
    }
  }
}

}  // namespace
}  // namespace moesaic::testing
