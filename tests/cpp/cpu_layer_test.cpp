// A layer of the CPU backend through its two phases, gate_up and down: beside f64, and bit for bit
// whatever the row map, the layout, the threads and the instruction set.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "cpu/isa.hpp"
#include "layers.hpp"
#include "moesaic/moesaic.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

/// How the pairs are handed to a phase.
enum class Form { Pairs, Buckets, Blocks };

/// Row maps of both phases over the pairs of a routing; rows are written in pair order.
struct Maps {
  std::vector<std::int32_t> offsets, expert, source, destination;
  RowMap gate_up, down;

  Maps(const Routing& routing, std::int32_t experts, Form form) {
    const auto ids = routing.topk_ids();
    const auto count = static_cast<std::int32_t>(ids.size());
    if (form == Form::Pairs) {
      expert.assign(ids.begin(), ids.end());
      gate_up = {.num_segments = count, .expert = expert.data(), .limit = count};
    } else {
      constexpr std::int32_t kBlock = 8;
      offsets.push_back(0);
      for (std::int32_t e = 0; e < experts; ++e) {
        for (std::int32_t p = 0; p < count; ++p) {
          if (ids[static_cast<std::size_t>(p)] == e) destination.push_back(p);
        }
        if (form == Form::Blocks) {
          while (destination.size() % kBlock != 0) destination.push_back(count);
          while (expert.size() * kBlock < destination.size()) expert.push_back(e);
        }
        offsets.push_back(static_cast<std::int32_t>(destination.size()));
      }
      if (form == Form::Blocks) {
        expert.push_back(-1);  // behind the last block
        destination.resize(expert.size() * kBlock, count);
        gate_up = {.num_segments = static_cast<std::int32_t>(expert.size()),
                   .expert = expert.data(),
                   .width = kBlock};
      } else {
        gate_up = {.num_segments = experts, .offsets = offsets.data()};
      }
      source = destination;
      gate_up.limit = count;
      gate_up.source = source.data();
      gate_up.destination = destination.data();
    }
    down = gate_up;
    gate_up.source_divisor = routing.top_k();
  }
  Maps(const Maps&) = delete;
  Maps& operator=(const Maps&) = delete;
};

/// Both phases of a layer.
struct PhasesCase {
  const ExpertStack* stack = nullptr;
  Activation activation = {};
  const Floats* x = nullptr;
  Routing routing = {};
  Form form = Form::Pairs;
  Precision precision = Precision::Exact;
};

Floats run_case(Context& context, PhasesCase c) {
  const StackShape& shape = c.stack->shape();
  const auto pairs = static_cast<std::int64_t>(c.routing.topk_ids().size());
  const Maps maps(c.routing, shape.num_experts, c.form);
  Floats hidden = poisoned(pairs * shape.intermediate_size);
  Floats rows = poisoned(pairs * shape.hidden_size);
  Floats out = poisoned(c.routing.num_tokens() * shape.hidden_size);
  GuardedMemory scratch(
      context.backend().scratch_bytes({shape, c.routing.num_tokens(), c.routing.top_k(), pairs}));
  op::GateUp gate_up;
  gate_up.gate = c.stack->gate().view();
  gate_up.up = c.stack->up().view();
  gate_up.activation = c.activation;
  gate_up.map = maps.gate_up;
  gate_up.in = dense_rows(*c.x, shape.hidden_size);
  gate_up.hidden = hidden.data();
  gate_up.precision = c.precision;
  gate_up.scratch = scratch.data();
  context.backend().gate_up(context, gate_up);
  op::Down down;
  down.weight = c.stack->down().view();
  down.map = maps.down;
  down.in = dense_rows(hidden, shape.intermediate_size);
  down.rows = rows.data();
  down.combine.rows = rows.data();
  down.combine.routing = c.routing.view();
  down.combine.out = {.data = out.data(),
                      .dtype = DType::F32,
                      .cols = shape.hidden_size,
                      .stride = shape.hidden_size};
  down.precision = c.precision;
  down.scratch = scratch.data();
  context.backend().down(context, down);
  EXPECT_TRUE(scratch.guard_untouched());
  return out;
}

/// A case's layer as the CPU backend prepares it, with an input, a routing and the answer in f64.
struct Problem {
  TestLayer layer;
  ExpertStack stack;
  Floats x;
  Routing routing;
  Doubles want;
  explicit Problem(const Case& c, StackLayout layout = StackLayout::Auto)
      : layer(c),
        stack(layer.stack(&backend_for(Device{}), layout)),
        x(random_values(c.tokens * c.hidden, 31)),
        routing(make_routing(c)),
        want(forward_f64(layer, x, routing)) {}
  PhasesCase phases(Form form = Form::Pairs, Precision precision = Precision::Exact) const {
    return {.stack = &stack,
            .activation = layer.activation,
            .x = &x,
            .routing = routing,
            .form = form,
            .precision = precision};
  }
};

TEST(CpuLayer, FormsThreadsAndLayoutsGiveTheSameBits) {
  Case c{"", 1, 512, 256, 5, 3, QuantType::Q4_K, QuantType::Q4_K, QuantType::Q6_K};
  for (const std::int64_t tokens : {1, 7, 80}) {
    c.tokens = tokens;
    for (const RoutingShape shape : {RoutingShape::Uniform, RoutingShape::Skipped}) {
      c.routing = shape;
      const Problem panels(c), rows(c, StackLayout::File);
      for (const Precision precision : {Precision::Exact, Precision::Fast}) {
        Floats first;
        for (const CpuIsa isa : cpu::supported_isas()) {
          if (isa == CpuIsa::Scalar) continue;
          for (const int threads : {1, 2, 5}) {
            Context context = cpu_context(isa, threads);
            for (const Form form : {Form::Pairs, Form::Buckets, Form::Blocks}) {
              for (const Problem* p : {&panels, &rows}) {
                const Floats y = run_case(context, p->phases(form, precision));
                if (first.empty()) {
                  first = y;
                  EXPECT_LT(rel_l2(y, p->want), precision == Precision::Exact ? 1e-4 : 1.3e-2);
                }
                ASSERT_TRUE(same_bits(first, y))
                    << name_of(isa) << " tokens " << tokens << " threads " << threads << " form "
                    << static_cast<int>(form) << " panels " << (p == &panels);
              }
            }
          }
        }
      }
    }
  }
}

TEST(CpuLayer, ATokenDoesNotDependOnItsBatch) {
  const Case c{"", 90, 256, 256, 4, 2, QuantType::Q4_K, QuantType::Q5_K, QuantType::Q6_K};
  const Problem p(c);
  Context context = cpu_context();
  for (const Precision precision : {Precision::Exact, Precision::Fast}) {
    const Floats all = run_case(context, p.phases(Form::Buckets, precision));
    for (std::int64_t t = 0; t < c.tokens; t += 7) {
      const Floats row(p.x.begin() + c.hidden * t, p.x.begin() + c.hidden * (t + 1));
      PhasesCase one = p.phases(Form::Pairs, precision);
      one.x = &row;
      one.routing.resize(1, c.top_k);
      std::copy_n(p.routing.topk_ids().begin() + t * c.top_k, c.top_k,
                  one.routing.topk_ids().begin());
      std::copy_n(p.routing.topk_weights().begin() + t * c.top_k, c.top_k,
                  one.routing.topk_weights().begin());
      EXPECT_TRUE(same_bits(run_case(context, one),
                            {all.begin() + c.hidden * t, all.begin() + c.hidden * (t + 1)}))
          << t;
    }
  }
}

TEST(CpuLayer, EveryActivationWithBiasAndScaleMeetsF64) {
  for (const ActivationKind kind :
       {ActivationKind::SwiGlu, ActivationKind::SwiGluClampInput, ActivationKind::SwiGluClampOutput,
        ActivationKind::SwiGluOai, ActivationKind::GeGluTanh, ActivationKind::ReGlu,
        ActivationKind::GeluTanh, ActivationKind::ReluSquared, ActivationKind::SiTu}) {
    Case c{"", 5, 96, 160, 3, 2, QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4};
    c.activation = kind;
    c.epilogue = true;
    const Problem p(c);
    for (const CpuIsa isa : cpu::supported_isas()) {
      Context context = cpu_context(isa);
      EXPECT_LT(rel_l2(run_case(context, p.phases()), p.want), 1e-4)
          << name_of(kind) << " " << name_of(isa);
    }
  }
}

TEST(CpuLayer, OddShapesMeetF64) {
  const Case cases[] = {
      {"", 3, 2880, 96, 2, 2, QuantType::MXFP4, QuantType::MXFP4, QuantType::MXFP4},
      {"", 4, 256, 704, 3, 2, QuantType::Q4_K, QuantType::Q4_K, QuantType::Q5_1},
      {"", 9, 256, 1408, 2, 1, QuantType::Q4_K, QuantType::Q6_K, QuantType::Q8_0},
      // f32 beside integers
      {"", 5, 160, 37, 3, 3, QuantType::Q4_0, QuantType::F16, QuantType::BF16},
      {"", 2, 32, 1, 1, 1, QuantType::F32, QuantType::Q5_0, QuantType::F32},
      {"", 40, 256, 32, 512, 7, QuantType::IQ2_XXS, QuantType::IQ3_S, QuantType::IQ4_NL},
      // all to one expert, and each to every expert
      {"", 200, 64, 64, 1, 1, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_1},
      {"", 33, 64, 64, 6, 6, QuantType::Q8_0, QuantType::Q8_0, QuantType::Q4_1},
  };
  for (const Case& c : cases) {
    const Problem p(c);
    for (const CpuIsa isa : cpu::supported_isas()) {
      if (isa == CpuIsa::Scalar && c.experts > 100) continue;
      Context context = cpu_context(isa);
      for (const Form form : {Form::Pairs, Form::Blocks}) {
        EXPECT_LT(rel_l2(run_case(context, p.phases(form)), p.want), 1e-4)
            << name_of(isa) << " H " << c.hidden << " I " << c.intermediate;
      }
    }
  }
}

TEST(CpuLayer, NoTokensGiveNothingAndSkippedPairsZeros) {
  const Problem p({"", 2, 64, 64, 2, 1, QuantType::Q4_0, QuantType::Q4_0, QuantType::Q4_0});
  Context context = cpu_context();
  const Floats nothing;
  PhasesCase c = p.phases();
  c.x = &nothing;
  c.routing = Routing(0, 2);
  EXPECT_TRUE(run_case(context, c).empty());
  c = p.phases();
  std::ranges::fill(c.routing.topk_ids(), -1);
  for (const float v : run_case(context, c)) EXPECT_EQ(v, 0.0F);
}

}  // namespace
}  // namespace moesaic::testing
