// The whole Metal way, host and kernels: decode, batched decode and prefill of every format against
// f64. On a Mac the same tests run on the real device.

#include "metal_forward.hpp"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace moesaic::testing {
namespace {

/// INT4 has rows of its own kind: metal_int4_test.cpp.
std::vector<QuantType> formats_in_rows() {
  std::vector<QuantType> types{
#define MOESAIC_METAL_FORMAT(type, suffix) QuantType::type,
#include "metal/kernels.inc"
  };
  std::erase(types, QuantType::INT4);
  return types;
}

TEST_F(MetalForward, EveryFormatAndPathAgreesWithF64) {
  struct Way {
    std::int64_t tokens;
    GemmMode gemm;
    RowSpaceMode row_space;
    Precision precision;
  };
  // Decode, batched decode (GEMV over buckets), prefill (indirect grid, f32 and half), aligned.
  const Way ways[] = {
      {1, GemmMode::Auto, RowSpaceMode::Auto, Precision::Exact},
      {4, GemmMode::Auto, RowSpaceMode::Auto, Precision::Exact},
      {17, GemmMode::Auto, RowSpaceMode::Auto, Precision::Exact},
      {17, GemmMode::Auto, RowSpaceMode::PackedRows, Precision::Fast},
      {5, GemmMode::Aligned, RowSpaceMode::TokenPairs, Precision::Exact},
      {5, GemmMode::Aligned, RowSpaceMode::PackedRows, Precision::Fast},
  };
  for (const QuantType type : formats_in_rows()) {
    const TestLayer layer(case_of(type, 1));
    const ExpertStack stack = layer.stack(&backend());
    for (const Way& way : ways) {
      SCOPED_TRACE(std::string(traits(type).name) + ", " + std::to_string(way.tokens) + " tokens");
      Case c = layer.shape;
      c.tokens = way.tokens;
      const Floats x = random_values(c.tokens * c.hidden, 3);
      const Floats logits = random_values(c.tokens * c.experts, 4);
      const Routing routing = route_on_host(c, logits);
      Tuning tuning;
      tuning.gemm = way.gemm;
      tuning.row_space = way.row_space;
      tuning.precision = way.precision;
      const Result got = forward(layer, stack, router_of(c), x, logits, tuning);
      EXPECT_TRUE(std::ranges::equal(got.ids, routing.topk_ids()));
      EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, routing)), bound(way.precision));
    }
  }
}

// Top-k, buckets, tiles and grid are all made on the device and compared with the host's, for
// routings that leave experts empty or overfull (64 tokens: two full tiles), and must be the same
// in every order in which threads may run.
TEST_F(MetalForward, DevicePrefillIsTheHostsPrefill) {
  for (const int shape : {0, 1, 2, 3}) {
    Case c{"prefill", 64, 64, 96, 6, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
    const TestLayer layer(c);
    const ExpertStack stack = layer.stack(&backend());
    const Floats x = random_values(c.tokens * c.hidden, 3);
    Floats logits = random_values(c.tokens * c.experts, 5);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const std::size_t e = i % static_cast<std::size_t>(c.experts);
      if (shape == 1 && e == 5) logits[i] += 100.0F;           // all to one
      if (shape == 2 && e >= 2) logits[i] -= 100.0F;           // most experts empty
      if (shape == 3) logits[i] = static_cast<float>(e == 1);  // ties
    }
    const Routing routing = route_on_host(c, logits);
    const Doubles want = forward_f64(layer, x, routing);
    Floats first;
    for (const std::uint64_t seed : emulation::seeds()) {
      SCOPED_TRACE("shape " + std::to_string(shape) + ", seed " + std::to_string(seed));
      emulation::options().seed = seed;
      Tuning tuning;
      tuning.precision = Precision::Exact;
      const Result got = forward(layer, stack, router_of(c), x, logits, tuning);
      EXPECT_TRUE(std::ranges::equal(got.ids, routing.topk_ids()));
      EXPECT_LE(rel_l2(got.y, want), kF32Bound);
      if (first.empty()) first = got.y;
      EXPECT_EQ(got.y, first) << "the result depends on the order of threads";
    }
  }
}

TEST_F(MetalForward, UnfusedAndUngatedLayersWithEpilogue) {
  Case mixed{"mixed", 2, 96, 64, 5, 2, QuantType::F16, QuantType::Q8_0, QuantType::Q4_0};
  Case biased{"biased", 11, 96, 64, 5, 3, QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4};
  biased.activation = ActivationKind::SwiGluOai;
  biased.epilogue = true;
  Case ungated{"ungated", 3, 64, 96, 5, 2, QuantType::F16, QuantType::Q8_0, QuantType::Q8_0};
  ungated.activation = ActivationKind::ReluSquared;
  ungated.epilogue = true;
  for (const Case& c : {mixed, biased, ungated}) {
    for (const std::int64_t tokens : {std::int64_t{1}, c.tokens, std::int64_t{30}}) {
      SCOPED_TRACE(std::string(c.name) + ", " + std::to_string(tokens) + " tokens");
      Case sized = c;
      sized.tokens = tokens;
      const TestLayer layer(sized);
      const ExpertStack stack = layer.stack(&backend());
      const Floats x = random_values(tokens * c.hidden, 3);
      const Floats logits = random_values(tokens * c.experts, 4);
      Tuning tuning;
      tuning.precision = Precision::Exact;
      const Result got = forward(layer, stack, router_of(sized), x, logits, tuning);
      EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, route_on_host(sized, logits))), kF32Bound);
    }
  }
}

// One row for all slots, a row per slot, tokens with slots, and views with strides: one operation.
TEST_F(MetalForward, NamedGemvsFollowTheirStrides) {
  Case c{"gemv", 3, 64, 96, 5, 2, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q8_0};
  const TestLayer layer(c);
  const ExpertStack stack = layer.stack(&backend());
  Context context = this->context();
  const std::vector<std::int32_t> chosen{4, 1, -1, 0, 2, 2};
  const auto ids = array(chosen);
  const Floats values = random_values(6 * 80, 3);
  const auto memory = array(values);
  struct Form {
    std::int64_t tokens, outer, inner;  // strides of x [tokens, 2, H] in elements
  };
  for (const Form& form : {Form{1, 0, 0}, Form{1, 0, 80}, Form{3, 160, 80}, Form{3, 70, 0}}) {
    const std::int64_t pairs = form.tokens * 2;
    ConstTensorView x(memory.data(), DType::F32, {form.tokens, 2, c.hidden}, device());
    x.strides = {form.outer, form.inner, 1, 0};
    const ConstTensorView slots(ids.data(), DType::I32, {form.tokens, 2}, device());
    const auto up = poisoned<float>(pairs * c.intermediate);
    const auto hidden = poisoned<float>(pairs * c.intermediate);
    const auto view = [&](const DeviceArray<float>& out) {
      return TensorView(out.data(), DType::F32, {form.tokens, 2, c.intermediate}, device());
    };
    expert_gemv(context, stack, Role::Up, x, slots, view(up));
    expert_gemv_gate_up(context, stack, layer.activation, x, slots, view(hidden));
    backend().synchronize(context);
    Doubles want_up, want_hidden;
    for (std::int64_t p = 0; p < pairs; ++p) {
      const float* row = values.data() + p / 2 * form.outer + p % 2 * form.inner;
      const Doubles in(row, row + c.hidden);
      const std::int32_t e = chosen[static_cast<std::size_t>(p)];
      const Doubles zeros(static_cast<std::size_t>(c.intermediate));
      const Doubles u = e < 0 ? zeros : apply_f64(layer.up, e, in.data());
      const Doubles h = e < 0 ? zeros : hidden_f64(layer, e, in.data());
      want_up.insert(want_up.end(), u.begin(), u.end());
      want_hidden.insert(want_hidden.end(), h.begin(), h.end());
    }
    EXPECT_LE(rel_l2(up.host(), want_up), kF32Bound) << form.outer << " " << form.inner;
    EXPECT_LE(rel_l2(hidden.host(), want_hidden), kF32Bound) << form.outer << " " << form.inner;
  }
}

TEST_F(MetalForward, StrictAndProfiledCallsCountNonfiniteRows) {
  const TestLayer layer(case_of(QuantType::Q8_0, 3));
  const ExpertStack stack = layer.stack(&backend());
  const Case& c = layer.shape;
  const Floats x = random_values(c.tokens * c.hidden, 3);
  Floats logits = random_values(c.tokens * c.experts, 4);
  logits[1] = kPoison;
  Tuning strict;
  strict.strict = true;
  EXPECT_THROW(forward(layer, stack, router_of(c), x, logits, strict), Error);
  const Result got = forward(layer, stack, router_of(c), x, logits, {});
  EXPECT_LE(rel_l2(got.y, forward_f64(layer, x, route_on_host(c, logits))), kF32Bound);
}

}  // namespace
}  // namespace moesaic::testing
