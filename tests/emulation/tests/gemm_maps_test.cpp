// Products of every row map: who multiplies what, and what may not change the bits.
#include "gemm_run.hpp"

namespace moesaic::testing {
namespace {

TEST(GemmMaps, EveryMapAndRouting) {
  const Format format = format_named("q4_k");
  struct Shape {
    std::int32_t experts, top_k;
    std::int64_t tokens;
    RoutingShape routing;
  };
  for (const Shape& shape :
       {Shape{1, 1, 1, RoutingShape::Uniform}, Shape{1, 1, 17, RoutingShape::Uniform},
        Shape{4, 4, 3, RoutingShape::Uniform}, Shape{4, 2, 33, RoutingShape::AllToOne},
        Shape{4, 2, 9, RoutingShape::EmptyExperts}, Shape{4, 2, 9, RoutingShape::Skipped},
        Shape{40, 2, 20, RoutingShape::Zipf}}) {
    const Routing routing = routing_of(shape.experts, shape.tokens, shape.top_k, shape.routing);
    const TestRole role = make_format_role(format, shape.experts, 24, 256, 12, true);
    const PackedRole packed = pack_role(role);
    std::vector<Map> maps = {pairs_map(routing), buckets_map(routing, shape.experts),
                             blocks_map(routing, shape.experts, 8),
                             blocks_map(routing, shape.experts, 48)};
    if (shape.experts == 1) maps.push_back(single_map(static_cast<std::int32_t>(shape.tokens)));
    for (const Map& map : maps) {
      const Input in(shape.tokens, 256, DType::F32, 25);
      expect_near(run_gemm(packed.view(), packed.ref, map, in, true, 0), product_f64(role, map, in),
                  kExactBound,
                  map.name + " of " + std::to_string(shape.tokens) + " tokens, " +
                      std::to_string(shape.experts) + " experts");
    }
  }
}

TEST(GemmMaps, DispatchListsNameRowsAndExpertsFreely) {
  // (expert, first row in, first row out, rows), an expert twice, one that is not there.
  struct Dispatch {
    std::int32_t expert, in, out, rows;
  };
  Map map("dispatches", 30);
  map.offsets.push_back(0);
  for (const Dispatch& d : {Dispatch{2, 3, 0, 2}, Dispatch{0, 0, 5, 11}, Dispatch{-1, 0, 2, 3},
                            Dispatch{2, 11, 20, 1}, Dispatch{1, 7, 25, 0}, Dispatch{1, 5, 21, 7}}) {
    map.expert.push_back(d.expert);
    for (std::int32_t i = 0; i < d.rows; ++i) {
      map.source.push_back(d.in + i);
      map.destination.push_back(d.out + i);
    }
    map.offsets.push_back(static_cast<std::int32_t>(map.source.size()));
  }
  map.facts.num_segments = static_cast<std::int32_t>(map.expert.size());
  for (const char* name : {"int4_g128", "int4_g64_orders"}) {
    const Format format = format_named(name);
    const TestRole role = make_format_role(format, 3, 48, 200, 34, false);
    const PackedRole packed = pack_role(role);
    const Input in(12, 200, DType::F32, 35);
    expect_near(run_gemm(packed.view(), packed.ref, map, in, true, 0), product_f64(role, map, in),
                kExactBound, format.name);
  }
}

TEST(GemmMaps, ATokenThatIsNotFiniteHarmsNoOther) {
  const Format format = format_named("q5_k");
  const TestRole role = make_format_role(format, 1, 16, 256, 38, false);
  const PackedRole packed = pack_role(role);
  const Map map = single_map(4);
  Input in(4, 256, DType::F32, 39);
  const Floats clean = run_gemm(packed.view(), packed.ref, map, in, true, 0);
  in.values[1 * 256 + 77] = std::numeric_limits<float>::quiet_NaN();
  in.values[3 * 256 + 1] = std::numeric_limits<float>::infinity();
  in.rows.data = in.values.data();
  const Floats got = run_gemm(packed.view(), packed.ref, map, in, true, 0);
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (i / 16 % 2 == 0) {
      EXPECT_EQ(got[i], clean[i]) << i;
    } else {
      EXPECT_FALSE(std::isfinite(got[i])) << i;
    }
  }
}

TEST(GemmMaps, NothingToDoTouchesNothing) {
  const Format format = format_named("q8_0");
  const TestRole role = make_format_role(format, 2, 16, 64, 13, true);
  const PackedRole packed = pack_role(role);
  Routing skipped(3, 2);
  std::fill(skipped.topk_ids().begin(), skipped.topk_ids().end(), -1);
  Routing garbage(3, 2);
  const std::int32_t ids[] = {2, -7, 1000000, INT32_MIN, INT32_MAX, -1};
  std::copy(std::begin(ids), std::end(ids), garbage.topk_ids().begin());
  const Input in(3, 64, DType::F32, 26);
  for (const Map& map : {pairs_map(skipped), buckets_map(skipped, 2), blocks_map(skipped, 2, 8),
                         pairs_map(garbage), single_map(0)}) {
    emulation::counters() = {};
    for (const float v : run_gemm(packed.view(), packed.ref, map, in, true, 0)) {
      EXPECT_TRUE(std::isnan(v)) << map.name;
    }
    EXPECT_EQ(emulation::counters().weight_bytes, 0U) << map.name;
  }
}

TEST(GemmMaps, SlotsAndTablesFindTheirExperts) {
  const Format format = format_named("q4_0");
  const TestRole role = make_format_role(format, 4, 20, 96, 14, true);
  const PackedRole packed = pack_role(role);
  const Routing routing = routing_of(4, 5, 4, RoutingShape::Uniform);
  const Map map = buckets_map(routing, 4);
  const Input in(5, 96, DType::F32, 27);
  Answer want = product_f64(role, map, in);

  const std::byte* reversed[4];
  for (int slot = 0; slot < 4; ++slot) {
    reversed[slot] = packed.memory.get() + (3 - slot) * packed.ref.expert_stride;
  }
  const std::int32_t slots[] = {3, 2, -1, 0};  // expert 2 is not resident
  RoleRef weight = packed.view();
  weight.ref.base = nullptr;
  weight.ref.table = reversed;
  weight.ref.slot_map = slots;
  map.for_each(4, [&](std::int32_t e, std::int64_t, std::int64_t to) {
    if (e == 2) std::fill_n(want.values.begin() + to * 20, 20, std::nan(""));
  });
  expect_near(run_gemm(weight, packed.ref, map, in, true, 0), want, kExactBound, "slots");
}

TEST(GemmMaps, InputRowsMayHaveAnyStride) {
  const Format format = format_named("q5_0");
  const TestRole role = make_format_role(format, 2, 18, 96, 16, false);
  const PackedRole packed = pack_role(role);
  const Map map = pairs_map(routing_of(2, 3, 2, RoutingShape::Uniform));  // source = pair / 2
  Input in(3, 96, DType::F32, 29);
  const Answer want = product_f64(role, map, in);
  // Rows 101 elements apart from an odd address, each standing for two inner ones.
  Floats apart(1 + 3 * 101, kPoison);
  for (int r = 0; r < 3; ++r) {
    std::copy_n(in.values.begin() + r * 96, 96, apart.begin() + 1 + r * 101);
  }
  Map inner = map;
  inner.facts.source_divisor = 1;
  in.rows.data = apart.data() + 1;
  in.rows.num_rows = 6;
  in.rows.inner_count = 2;
  in.rows.outer_stride = 101;
  in.rows.inner_stride = 0;
  expect_near(run_gemm(packed.view(), packed.ref, inner, in, true, 0), want, kExactBound,
              "strided");
}

TEST(GemmMaps, ATokensBitsDependOnItAlone) {
  // Beside other tokens, by any map, under any schedule.
  for (const char* name : {"q6_k", "int4_g64_orders"}) {
    const Format format = format_named(name);
    const std::int64_t cols = format.cols_step == 256 ? 768 : 712;
    const TestRole role = make_format_role(format, 2, 24, cols, 17, true);
    const PackedRole packed = pack_role(role);
    const Input in(19, cols, DType::F32, 30), alone(1, cols, DType::F32, 30);
    Routing routing(19, 1), one(1, 1);
    std::fill(routing.topk_ids().begin(), routing.topk_ids().end(), 1);
    one.topk_ids()[0] = 1;
    const auto run = [&](const Map& map, const Input& x, std::uint64_t seed) {
      return run_gemm(packed.view(), packed.ref, map, x, true, seed, true);
    };
    const Floats all = run(buckets_map(routing, 2), in, 0);
    expect_same_bits(Floats(all.begin(), all.begin() + 24), run(pairs_map(one), alone, 0),
                     format.name);
    for (const std::uint64_t seed : emulation::seeds()) {
      for (const Map& map :
           {buckets_map(routing, 2), pairs_map(routing), blocks_map(routing, 2, 16)}) {
        expect_same_bits(run(map, in, seed), all,
                         format.name + " " + map.name + " seed " + std::to_string(seed));
      }
    }
  }
}

TEST(GemmMaps, DownCombinesInSlotOrder) {
  constexpr std::int32_t kExperts = 4, kTopK = 3;
  Routing routing = routing_of(kExperts, 5, kTopK, RoutingShape::Skipped);
  for (const char* name : {"q6_k", "int4_g128"}) {
    const Format format = format_named(name);
    const std::int64_t cols = 256, rows = 40;
    const TestRole role = make_format_role(format, kExperts, rows, cols, 19, true);
    const PackedRole packed = pack_role(role);
    Map map = buckets_map(routing, kExperts);
    map.source = map.destination;  // hidden rows are pairs
    const Input in(5 * kTopK, cols, DType::F32, 32);
    const Answer pairs = product_f64(role, map, in);
    Floats pair_rows(static_cast<std::size_t>(5 * kTopK * rows), kPoison);
    Floats out(static_cast<std::size_t>(5 * rows), kPoison);
    const Scratch scratch(map, 5 * kTopK, packed.ref, false);
    ASSERT_EQ(cuda::launch_down({.weight = packed.view(),
                                 .map = map.view(),
                                 .in = in.rows,
                                 .rows = pair_rows.data(),
                                 .combine = {.rows = pair_rows.data(),
                                             .routing = routing.view(),
                                             .out = {out.data(), DType::F32, rows, rows},
                                             .num_experts = kExperts},
                                 .scratch = scratch.data()},
                                nullptr),
              cuda::kOk);
    Answer want{Doubles(out.size(), 0.0), {}};
    for (std::size_t p = 0; p < 5 * kTopK; ++p) {
      if (routing.topk_ids()[p] < 0) continue;
      for (std::size_t r = 0; r < static_cast<std::size_t>(rows); ++r) {
        want.values[p / kTopK * rows + r] += static_cast<double>(routing.topk_weights()[p]) *
                                             pairs.values[p * static_cast<std::size_t>(rows) + r];
      }
    }
    expect_near(out, want, kExactBound, format.name);
  }
}

TEST(GemmMaps, WhatCannotRunIsRefused) {
  const Format format = format_named("q4_k");
  const PackedRole packed = pack_role(make_format_role(format, 1, 16, 256, 20, false));
  const Input in(1, 256, DType::F32, 33);
  const Map map = single_map(1);
  const Scratch scratch(map, 1, packed.ref, false);
  Floats out(16);
  op::Gemm call{.weight = packed.view(),
                .map = map.view(),
                .in = in.rows,
                .out = out.data(),
                .scratch = scratch.data()};
  EXPECT_EQ(cuda::launch_gemm(call, nullptr), cuda::kOk);
  call.weight.ref.type = QuantType::IQ1_S;
  EXPECT_EQ(cuda::launch_gemm(call, nullptr), cuda::kUnsupported);
  EXPECT_EQ(cuda::gemm_name(call.weight.ref), nullptr);
}

}  // namespace
}  // namespace moesaic::testing
