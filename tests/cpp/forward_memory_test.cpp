// The memory of a forward: its workspace is exactly as large as it says, and a call allocates
// nothing.

#include <gtest/gtest.h>

#include <string>

#include "count_allocations.hpp"
#include "forward_problem.hpp"

namespace moesaic::testing {
namespace {

INSTANTIATE_TEST_SUITE_P(Cases, ForwardCase, ::testing::ValuesIn(cases::kCases),
                         [](const auto& info) { return std::string(info.param.name); });

TEST_P(ForwardCase, WorkspaceIsExact) {
  Problem p(GetParam());
  const std::int64_t tokens = p.shape().tokens;
  if (tokens == 0) return;
  for (const Backend* backend : test_backends()) {
    const ExpertStack stack = p.layer.stack(backend);
    Context context = poisoned_context(*backend);
    const LayerCase c = p.on(stack);
    const std::size_t bytes = workspace_bytes(context, c.layer, c.top_k(), tokens);
    for (const Way& way : kWays) {
      Tensor y(DType::F32, tokens, p.shape().hidden);
      const std::vector<std::byte> untouched = y.bytes;
      const ForwardIo io = c.io(y.view());
      GuardedMemory memory(bytes);
      Workspace small(memory.data(), bytes - 1), exact(memory.data(), bytes);
      EXPECT_THROW(forward(context, c.layer, io, small, way), WorkspaceError) << way.name;
      EXPECT_EQ(y.bytes, untouched) << way.name;
      forward(context, c.layer, io, exact, way);
      EXPECT_TRUE(memory.guard_untouched()) << backend->info().name << " " << way.name;
      const std::vector<std::byte> first = y.bytes;
      forward(context, c.layer, io, exact, way);
      EXPECT_EQ(y.bytes, first) << backend->info().name << " " << way.name;
    }
    for (std::int64_t t = 0; t < tokens; ++t) {
      EXPECT_LE(workspace_bytes(context, c.layer, c.top_k(), t), bytes) << t;
    }
  }
}

#if defined(MOESAIC_COUNTS_MALLOC)
/// Every way of a case with its own router.
void expect_no_allocation(const Case& c) {
  Problem p(c);
  const RouterConfig router = plain_router(c);
  const Floats weight = random_values(router.num_experts * c.hidden, 21);
  for (const Backend* backend : test_backends()) {
    for (const StackLayout layout : {StackLayout::Auto, StackLayout::File}) {
      const ExpertStack stack = p.layer.stack(layout == StackLayout::Auto ? backend : nullptr);
      Context context = poisoned_context(*backend);
      LayerCase call{.layer = p.ref(stack), .x = p.x.view()};
      call.layer.router = &router;
      call.layer.router_weight = &weight;
      Workspace workspace(workspace_bytes(context, call.layer, router.top_k, c.tokens));
      Tensor y(DType::F32, c.tokens, c.hidden);
      const ForwardIo io = call.io(y.view());
      for (const Way& way : kWays) {
        const auto run = [&] { forward(context, call.layer, io, workspace, way); };
        run();  // may set up threads
        EXPECT_EQ(test::count_allocations(run), 0)
            << backend->info().name << " " << way.name << " " << traits(c.up).name;
      }
    }
  }
}

TEST_P(ForwardCase, NoWayAllocates) { expect_no_allocation(GetParam()); }

TEST(Forward, NoTypeAllocates) {
  for (const QuantTraits& type : quant_table()) {
    if (!backend_for(Device{}).supports({.type = type.type}).ok) continue;
    const Case c{"", 5, 256, 256, 3, 2, type.type, type.type, type.type};
    expect_no_allocation(c);
  }
}
#endif

}  // namespace
}  // namespace moesaic::testing
