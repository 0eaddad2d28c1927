// What must not change a single bit of a token's output: the order of the tokens, the batch with
// batch_invariant, strides, and other threads.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <thread>

#include "forward_problem.hpp"

namespace moesaic::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(Cases, ForwardCase, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

/// Tokens and their routing in reverse order.
Problem reversed(const Problem& p) {
  Problem out = p;
  const std::int64_t tokens = p.shape().tokens, hidden = p.shape().hidden;
  const std::int32_t top_k = p.shape().top_k;
  for (std::int64_t t = 0; t < tokens; ++t) {
    const std::int64_t from = tokens - 1 - t;
    std::copy_n(p.values.begin() + from * hidden, hidden, out.values.begin() + t * hidden);
    std::copy_n(p.routing.topk_ids().begin() + from * top_k, top_k,
                out.routing.topk_ids().begin() + t * top_k);
    std::copy_n(p.routing.topk_weights().begin() + from * top_k, top_k,
                out.routing.topk_weights().begin() + t * top_k);
  }
  out.x = Tensor(DType::F32, tokens, hidden, out.values);
  return out;
}

TEST_P(ForwardCase, PermutedTokensPermuteOutputs) {
  Problem p(GetParam());
  Problem backwards = reversed(p);
  const std::int64_t tokens = p.shape().tokens;
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context = poisoned_context(*backend, Precision::Fast);
    for (const Way& way : kWays) {
      const Tensor y = run_case(context, p.on(stack), way).out;
      const Tensor other = run_case(context, backwards.on(stack), way).out;
      for (std::int64_t t = 0; t < tokens; ++t) {
        EXPECT_EQ(y.row(t), other.row(tokens - 1 - t))
            << backend->info().name << " " << way.name << " token " << t;
      }
    }
  }
}

TEST_P(ForwardCase, BatchInvariantSplitsBitwise) {
  Problem p(GetParam());
  const std::int64_t tokens = p.shape().tokens;
  const std::int32_t top_k = p.shape().top_k;
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Tuning tuning;
    tuning.poison = true;
    tuning.batch_invariant = true;
    Context context(*backend, tuning, ThreadPool::shared(2));
    const Tensor whole = run_case(context, p.on(stack)).out;
    std::vector<std::byte> split;
    for (std::int64_t t = 0; t < tokens;) {
      const std::int64_t n = std::min<std::int64_t>(t % 3 + 1, tokens - t);
      LayerCase part = p.on(stack);
      part.x = p.x.slice(t, n);
      part.routing = {part.routing.topk_ids + t * top_k, part.routing.topk_weights + t * top_k, n,
                      top_k};
      const Tensor y = run_case(context, part).out;
      split.insert(split.end(), y.bytes.begin(), y.bytes.end());
      t += n;
    }
    EXPECT_EQ(whole.bytes, split) << backend->info().name;
  }
}

TEST_P(ForwardCase, StridedRowsGiveTheBitsOfDenseOnes) {
  Problem p(GetParam());
  const std::int64_t tokens = p.shape().tokens, hidden = p.shape().hidden;
  Tensor wide_x(DType::F32, tokens, hidden + 5);
  for (std::int64_t t = 0; t < tokens; ++t) {
    std::ranges::copy(p.x.row(t), wide_x.bytes.begin() + t * (hidden + 5) * 4);
  }
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context = poisoned_context(*backend);
    const Tensor y = run_case(context, p.on(stack)).out;
    LayerCase strided = p.on(stack);
    strided.x = wide_x.view();
    strided.x.shape[1] = hidden;
    Tensor wide_y(DType::F32, tokens, hidden + 3);
    TensorView narrow_y = wide_y.view();
    narrow_y.shape[1] = hidden;
    Workspace workspace(workspace_bytes(context, strided.layer, strided.top_k(), tokens));
    forward(context, strided.layer, strided.io(narrow_y), workspace);
    for (std::int64_t t = 0; t < tokens; ++t) {
      std::vector<std::byte> row = wide_y.row(t);
      row.resize(static_cast<std::size_t>(hidden) * 4);
      EXPECT_EQ(row, y.row(t));
      EXPECT_TRUE(std::isnan(wide_y.get(static_cast<std::size_t>(t * (hidden + 3) + hidden))));
    }
  }
}

TEST(Forward, EightThreadsAtOnceGiveTheSameBits) {
  Problem p(case_named("wide_batch"));
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context = poisoned_context(*backend);
    const LayerCase call = p.on(stack);
    const Tensor want = run_case(context, call).out;
    std::vector<Tensor> outputs(8, Tensor(DType::F32, want.rows, want.cols));
    std::vector<std::thread> threads;
    for (Tensor& y : outputs) {
      threads.emplace_back([&] { y = run_case(context, call).out; });
    }
    for (std::thread& t : threads) t.join();
    for (const Tensor& y : outputs) EXPECT_EQ(y.bytes, want.bytes) << backend->info().name;
  }
}

}  // namespace
}  // namespace moesaic::testing
