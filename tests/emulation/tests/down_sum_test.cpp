// Down products summed where they are multiplied: against f64, and bit for bit against the narrow
// products followed by combine.
#include "down_run.hpp"

namespace moesaic::testing {
namespace {

constexpr DType kTypes[] = {DType::F32, DType::F16, DType::BF16};

// Races do not depend on the type either.
std::vector<DType> types_to_run() {
  if (emulation::race_checked()) return {DType::BF16};
  return {std::begin(kTypes), std::end(kTypes)};
}

TEST(DownSum, EveryFormat) {
  constexpr std::int32_t kExperts = 3;
  const Routing routing = routing_of(kExperts, 2, 2, RoutingShape::Uniform);
  for (const Format& format : formats_to_run()) {
    const TestRole role = make_format_role(format, kExperts, 37, format.odd_cols(), 11, true);
    const PackedRole packed = pack_role(role);
    for (const DType dtype : kTypes) {
      const Input hidden(4, format.odd_cols(), dtype, 21);
      for (const bool exact : {true, false}) {
        if (!exact && dtype != DType::F32) continue;
        Down down{packed, routing, hidden};
        down.exact = exact;
        down.expect_right(role, single_pairs(routing),
                          format.name + " " + name_of(dtype) + (exact ? " exact" : " fast"));
      }
    }
  }
}

TEST(DownSum, EveryMapOfFewPairs) {
  constexpr std::int32_t kExperts = 40;
  const Routing routing = routing_of(kExperts, 3, 3, RoutingShape::Skipped);
  for (const char* name : {"q6_k", "int4_g64_orders", "int4_g32_order"}) {
    const Format format = format_named(name);
    const std::int64_t cols = format.odd_cols();
    const TestRole role = make_format_role(format, kExperts, 24, cols, 12, true);
    const PackedRole packed = pack_role(role);
    const Input hidden(9, cols, DType::BF16, 22);
    const Down down{packed, routing, hidden};
    for (const PairRows& rows :
         {single_pairs(routing), bucket_pairs(routing, kExperts),
          block_pairs(routing, kExperts, 16), packed_pairs(routing, kExperts)}) {
      down.expect_right(role, rows, format.name + " " + rows.map.name);
    }
  }
}

TEST(DownSum, AnyNumberOfSlotsAndTokens) {
  const TestRole role = make_role(64, 18, 288, QuantType::Q8_0, 13, false);
  const PackedRole packed = pack_role(role);
  for (const std::int32_t top_k : {1, 2, 3, 7, 8, 17, 64}) {
    const std::int64_t tokens = top_k > 8 ? 1 : top_k == 1 ? 8 : 3;
    const Routing routing = routing_of(64, tokens, top_k, RoutingShape::Uniform);
    const Input hidden(tokens * top_k, 288, DType::F32, 23);
    Down{packed, routing, hidden}.expect_right(role, single_pairs(routing),
                                               "top " + std::to_string(top_k));
  }
}

TEST(DownSum, OddSizes) {
  struct Size {
    std::int64_t rows, cols;
    QuantType type;
  };
  for (const Size& size :
       {Size{704, 1408, QuantType::Q4_0}, Size{1408, 704, QuantType::MXFP4},
        Size{2880, 96, QuantType::Q5_0}, Size{16, 2880, QuantType::Q8_0},
        Size{1, 8, QuantType::F16}, Size{17, 72, QuantType::F32}, Size{16, 512, QuantType::BF16},
        Size{15, 576, QuantType::BF16}, Size{33, 1280, QuantType::Q2_K}}) {
    if (emulation::race_checked() && size.rows > 100) continue;
    const Routing routing = routing_of(2, 1, 2, RoutingShape::Uniform);
    const TestRole role = make_role(2, size.rows, size.cols, size.type, 14, true);
    const PackedRole packed = pack_role(role);
    const Input hidden(2, size.cols, DType::BF16, 24);
    Down{packed, routing, hidden}.expect_right(
        role, single_pairs(routing), std::to_string(size.rows) + " x " + std::to_string(size.cols));
  }
}

TEST(DownSum, OutputsOfAnyTypeAndStrideAreAssignedOrAddedTo) {
  const TestRole role = make_role(4, 21, 96, QuantType::Q4_1, 15, true);
  const PackedRole packed = pack_role(role);
  const Routing routing = routing_of(4, 3, 2, RoutingShape::Skipped);
  for (const DType working : kTypes) {
    const Input hidden(6, 96, working, 25);
    for (const DType out : kTypes) {
      for (const bool accumulate : {false, true}) {
        Down down{packed, routing, hidden};
        down.out_dtype = out;
        down.gap = 5;
        down.accumulate = accumulate;
        down.weightless = accumulate && out == DType::F32;
        down.expect_right(role, single_pairs(routing),
                          std::string(name_of(working)) + " to " + name_of(out));
      }
    }
  }
}

TEST(DownSum, PairsThatAreSkippedAreNotRead) {
  const TestRole role = make_role(3, 40, 320, QuantType::Q5_1, 16, true);
  const PackedRole packed = pack_role(role);
  Routing routing(3, 5);
  const std::int32_t ids[] = {2, -7, 0, INT32_MIN, 1, 3, -1, 1000, INT32_MAX, -1, 0, 1, -1, 2, 1};
  std::copy(std::begin(ids), std::end(ids), routing.topk_ids().begin());
  for (std::size_t p = 0; p < 15; ++p) {
    // A weight of NaN must not reach a sum either.
    routing.topk_weights()[p] = ids[p] < 0 || ids[p] > 2 ? kPoison : 0.5F;
  }
  Input hidden(15, 320, DType::F32, 26);
  for (std::size_t p = 0; p < 15; ++p) {
    if (ids[p] >= 0 && ids[p] <= 2) continue;
    std::fill_n(hidden.values.begin() + static_cast<std::ptrdiff_t>(p) * 320, 320, kPoison);
  }
  hidden.rows.data = hidden.values.data();
  const Down down{packed, routing, hidden};
  const PairRows rows = single_pairs(routing);
  down.expect_right(role, rows, "ids");
  emulation::counters() = {};
  down.run(rows);
  EXPECT_EQ(emulation::counters().weight_bytes,
            static_cast<std::uint64_t>(7 * 3 * packed.ref.row_stride));

  std::fill(routing.topk_ids().begin(), routing.topk_ids().end(), -1);
  emulation::counters() = {};
  for (const float v : down.run(rows).values()) EXPECT_EQ(v, 0.0F);
  EXPECT_EQ(emulation::counters().weight_bytes, 0U);
}

TEST(DownSum, SlotsAndTablesFindTheirExperts) {
  const TestRole role = make_role(4, 20, 96, QuantType::Q4_0, 17, true);
  const PackedRole packed = pack_role(role);
  const Routing routing = routing_of(4, 2, 4, RoutingShape::Uniform);
  const Input hidden(8, 96, DType::F32, 27);
  const std::byte* reversed[4];
  for (int slot = 0; slot < 4; ++slot) {
    reversed[slot] = packed.memory.get() + (3 - slot) * packed.ref.expert_stride;
  }
  const std::int32_t everywhere[] = {3, 2, 1, 0};
  Down down{packed, routing, hidden};
  down.weight = packed.view();
  down.weight->ref.base = nullptr;
  down.weight->ref.table = reversed;
  down.weight->ref.slot_map = everywhere;
  down.expect_right(role, single_pairs(routing), "slots");

  // What is not resident adds nothing.
  const std::int32_t without_two[] = {3, 2, -1, 0};
  down.weight->ref.slot_map = without_two;
  Routing others = routing;
  for (std::int32_t& id : others.topk_ids()) id = id == 2 ? -1 : id;
  const Down rest{packed, others, hidden};
  EXPECT_EQ(down.run(single_pairs(routing)).bytes, rest.run(single_pairs(others)).bytes);
}

TEST(DownSum, ATokensBitsDependOnItAlone) {
  // Alone, beside others that ask for the same experts, fused or not, under any schedule.
  constexpr std::int32_t kExperts = 32;
  for (const DType dtype : types_to_run()) {
    const TestRole role = make_role(kExperts, 24, 768, QuantType::Q6_K, 18, true);
    const PackedRole packed = pack_role(role);
    Routing few = routing_of(kExperts, 2, 4, RoutingShape::AllToOne), many(9, 4);
    Routing one(1, 4);
    for (std::size_t p = 0; p < 36; ++p) {
      many.topk_ids()[p] = few.topk_ids()[p % 8];
      many.topk_weights()[p] = few.topk_weights()[p % 8];
    }
    std::copy_n(few.topk_ids().begin(), 4, one.topk_ids().begin());
    std::copy_n(few.topk_weights().begin(), 4, one.topk_weights().begin());
    const Input hidden(36, 768, dtype, 28);
    const auto first_row = [&](const Routing& routing, const PairRows& rows, std::uint64_t seed,
                               bool fused) {
      bool was_fused = false;
      const Tensor out = Down{packed, routing, hidden}.run(rows, seed, true, &was_fused);
      EXPECT_EQ(was_fused, fused) << rows.map.name;
      return std::vector<std::byte>(out.bytes.begin(), out.bytes.begin() + 24 * 4);
    };
    const auto want = first_row(one, single_pairs(one), 0, true);
    EXPECT_EQ(first_row(few, bucket_pairs(few, kExperts), 0, true), want);
    EXPECT_EQ(first_row(many, bucket_pairs(many, kExperts), 0, false), want);
    EXPECT_EQ(first_row(many, block_pairs(many, kExperts, 16), 0, false), want);
    for (const std::uint64_t seed : emulation::seeds()) {
      EXPECT_EQ(first_row(many, single_pairs(many), seed, true), want) << seed;
      EXPECT_EQ(first_row(few, bucket_pairs(few, kExperts), seed, true), want) << seed;
    }
  }
}

TEST(DownSum, AHiddenRowThatIsNotFiniteHarmsNoOtherToken) {
  const TestRole role = make_role(2, 16, 256, QuantType::Q5_K, 19, false);
  const PackedRole packed = pack_role(role);
  const Routing routing = routing_of(2, 3, 2, RoutingShape::Uniform);
  Input hidden(6, 256, DType::F32, 29);
  const Down down{packed, routing, hidden};
  const Floats clean = down.run(single_pairs(routing)).values();
  hidden.values[3 * 256 + 77] = std::numeric_limits<float>::infinity();
  hidden.rows.data = hidden.values.data();
  const Floats got = down.run(single_pairs(routing)).values();
  for (std::size_t i = 0; i < got.size(); ++i) {
    if (i / 16 == 1) {
      EXPECT_FALSE(std::isfinite(got[i])) << i;
    } else {
      EXPECT_EQ(got[i], clean[i]) << i;
    }
  }
}

TEST(DownSum, WeightsAreReadOncePerPairAndOnlyWhereFewShareAnExpert) {
  constexpr std::int32_t kExperts = 32;
  const std::uint64_t row_blocks = (37 + 15) / 16;
  for (const Format& format : formats_to_run()) {
    const TestRole role = make_format_role(format, kExperts, 37, format.odd_cols(), 18, false);
    const PackedRole packed = pack_role(role);
    const Input hidden(12, format.odd_cols(), DType::BF16, 31);
    for (const std::int32_t tokens : {1, 2, 3}) {
      const Routing routing = routing_of(kExperts, tokens, 4, RoutingShape::AllToOne);
      const bool few = 4 * tokens * 4 <= kExperts;
      const PairRows rows = bucket_pairs(routing, kExperts);
      std::uint64_t tiles = 0;
      for (std::size_t e = 0; e < kExperts; ++e) {
        tiles += rows.map.offsets[e] < rows.map.offsets[e + 1] ? 1U : 0U;
      }
      emulation::counters() = {};
      bool fused = false;
      Down{packed, routing, hidden}.run(rows, 0, false, &fused);
      EXPECT_EQ(fused, few) << tokens;
      // Whole units of bf16 in their order are read as they come, unless minima ask for sums.
      const bool staged = format.odd_cols() % 64 != 0 || packed.ref.int4.gather != nullptr ||
                          format.type == QuantType::Q4_K || format.type == QuantType::Q5_K;
      const bool tiled = !few || packed.ref.int4.gather_stride != 0;
      EXPECT_EQ(emulation::counters().launches,
                (tiled ? 1U : 0U) + (staged ? 1U : 0U) + 1U + (few ? 0U : 1U))
          << format.name;
      EXPECT_EQ(emulation::counters().weight_bytes,
                (few ? static_cast<std::uint64_t>(tokens * 4) : tiles) * row_blocks *
                    static_cast<std::uint64_t>(packed.ref.row_stride))
          << format.name << " of " << tokens << " tokens";
    }
  }
}

TEST(DownSum, NamesSayWhichWayRuns) {
  const PackedRole packed = pack_role(make_role(32, 16, 256, QuantType::Q4_K, 20, false));
  const WeightRef weight = packed.view().ref;
  EXPECT_STREQ(cuda::down_name(weight, 9, false), "down_sum_q4_k_mma");
  EXPECT_STREQ(cuda::down_name(weight, 8, true), "down_sum_q4_k_mma");
  EXPECT_STREQ(cuda::down_name(weight, 9, true), "down_q4_k_mma");
  WeightRef unknown = weight;
  unknown.type = QuantType::IQ1_S;
  EXPECT_EQ(cuda::down_name(unknown, 1, false), nullptr);
}

// Maps that are not those of a forward are multiplied and summed in two steps.
TEST(DownSum, RowsThatMoveTakeTwoSteps) {
  const TestRole role = make_role(32, 16, 96, QuantType::Q8_0, 22, false);
  const PackedRole packed = pack_role(role);
  const Routing routing = routing_of(32, 1, 2, RoutingShape::Uniform);
  const Input hidden(1, 96, DType::F32, 32);
  PairRows rows = single_pairs(routing);
  rows.map.facts.source_divisor = 2;  // both pairs read row 0
  bool fused = true;
  const Tensor out = Down{packed, routing, hidden}.run(rows, 0, false, &fused);
  EXPECT_FALSE(fused);
  const Input twice = [&] {
    Input in(2, 96, DType::F32, 32);
    std::copy_n(hidden.values.begin(), 96, in.values.begin() + 96);
    std::copy_n(hidden.values.begin(), 96, in.values.begin());
    in.rows.data = in.values.data();
    return in;
  }();
  EXPECT_EQ(out.bytes, Down({packed, routing, twice}).run(single_pairs(routing)).bytes);
}

}  // namespace
}  // namespace moesaic::testing
