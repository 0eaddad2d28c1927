#pragma once

/// run_case(): a described case in, its output out. Every overload poisons what the call is to
/// write, lends it exactly the memory it asks for, between guards, and fails the test when a guard
/// was touched. What the output must be is the caller's to say, by an oracle in f64 or by the
/// output of another run.

#include <gtest/gtest.h>

#include <cstdint>
#include <utility>
#include <vector>

#include "compare.hpp"
#include "layer_case.hpp"
#include "moesaic/backend.hpp"
#include "moesaic/thread_pool.hpp"
#include "tensor.hpp"
#include "ways.hpp"

namespace moesaic::testing {

/// A context whose workspace is poisoned before every call.
inline Context poisoned_context(const Backend& backend, Precision precision = Precision::Auto,
                                int threads = 2) {
  Tuning tuning;
  tuning.poison = true;
  tuning.precision = precision;
  return Context(backend, tuning, ThreadPool::shared(threads));
}

/// A context of the CPU backend that runs one instruction set, with threads of its own.
inline Context cpu_context(CpuIsa isa = CpuIsa::Auto, int threads = 2) {
  Tuning tuning;
  tuning.cpu_isa = isa;
  tuning.poison = true;
  return Context(backend_for(Device{}), tuning, std::make_shared<ThreadPool>(threads));
}

// ---- whole layers -------------------------------------------------------------------------------

/// What a layer answered.
struct Outcome {
  Tensor out;
  Floats before;    ///< what the call added to, as the output's type holds it; else empty
  Routing routing;  ///< what the router chose; empty where it had no choice

  Floats values() const { return out.values(); }
  /// The relative error beside `want`, the layer's own result in f64.
  double error(Doubles want) const {
    for (std::size_t i = 0; i < before.size(); ++i) want[i] += static_cast<double>(before[i]);
    return rel_l2(values(), want);
  }
};

/// The output of a case before its call.
inline Outcome outcome_before(const LayerCase& c) {
  Outcome outcome{Tensor(c.out, c.tokens(), c.layer.hidden_size()), {}, {}};
  if (c.added_to != nullptr) {
    outcome.out = Tensor(c.out, outcome.out.rows, outcome.out.cols, *c.added_to);
    outcome.before = outcome.out.values();
  }
  if (c.routes()) outcome.routing.resize(c.tokens(), c.top_k());
  return outcome;
}

/// Runs `call` with the inputs of `c` and the output and routing of an outcome.
template <class Call>
Outcome with_outcome(const LayerCase& c, Call&& call) {
  Outcome outcome = outcome_before(c);
  ForwardIo io = c.io(outcome.out.view());
  if (c.routes()) io.routing_out = outcome.routing.view();
  call(io);
  return outcome;
}

inline Outcome run_case(Context& context, const LayerCase& c, const Way& way = kWays[0]) {
  return with_outcome(c, [&](const ForwardIo& io) {
    const std::size_t bytes = workspace_bytes(context, c.layer, c.top_k(), c.tokens());
    GuardedMemory memory(bytes);
    Workspace workspace(memory.data(), bytes);
    forward(context, c.layer, io, workspace, way);
    EXPECT_TRUE(memory.guard_untouched()) << way.name;
  });
}

/// The case by the reference, which takes no context.
inline Outcome run_reference(const LayerCase& c) {
  return with_outcome(c, [&](const ForwardIo& io) { moe_forward_cpu(c.layer, io); });
}

// ---- products of one role -----------------------------------------------------------------------

/// y = W x for every row of x, each with an expert of its own.
struct ProductCase {
  const RoleWeights* weights = nullptr;
  InputRows x = {};
  std::vector<std::int32_t> experts;  ///< one per row; -1 skips the row
  Precision precision = Precision::Exact;
};

inline InputRows dense_rows(const Floats& x, std::int64_t cols) {
  return input_rows(rows_of(x, cols));
}

/// [rows, N]; rows that are skipped stay poisoned.
inline Floats run_case(Context& context, const ProductCase& c) {
  const WeightRef& ref = c.weights->ref;
  const auto rows = static_cast<std::int32_t>(c.experts.size());
  ScratchQuery query{{ref.num_experts, ref.cols, ref.rows}, rows, 1, rows};
  query.packed_cols = ref.int4.packed_cols;
  if (c.weights->delta != nullptr) query.low_rank = c.weights->delta->rank;
  GuardedMemory scratch(context.backend().scratch_bytes(query));
  Floats out = poisoned(rows * ref.rows);
  op::Gemm call;
  call.weight = c.weights->view();
  call.map = {.num_segments = rows, .expert = c.experts.data(), .limit = rows};
  call.in = c.x;
  call.out = out.data();
  call.precision = c.precision;
  call.scratch = scratch.data();
  context.backend().expert_gemm(context, call);
  EXPECT_TRUE(scratch.guard_untouched());
  return out;
}

}  // namespace moesaic::testing
