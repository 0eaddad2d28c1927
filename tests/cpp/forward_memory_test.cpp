// The memory of a forward: its workspace is exactly as large as it says, and a call allocates
// nothing.

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

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

/// What a forward in three calls keeps between them.
struct InParts {
  Context& context;
  const LayerRef& layer;
  ForwardIo io;
  Workspace& workspace;
  Routing routing;
  Tensor rows;

  InParts(Context& c, const LayerRef& l, const ForwardIo& whole, Workspace& w)
      : context(c),
        layer(l),
        io(whole),
        workspace(w),
        routing(whole.x.dim(0), l.router->top_k),
        rows(DType::F32, whole.x.dim(0) * l.router->top_k, l.stack->shape().hidden_size) {}

  void run() {
    ForwardIo part = io;
    part.routing_out = routing.view();
    moe_route(context, layer, part, workspace);
    part.routing_out = {};
    part.routing = routing.view();
    moe_expert_rows(context, layer, part, rows.view(), workspace);
    moe_finish(context, layer, part, rows.view(), workspace);
  }
};

TEST_P(ForwardCase, InThreeCallsItIsTheSame) {
  const Case& c = GetParam();
  Problem p(c);
  const RouterConfig router = plain_router(c);
  const Floats weight = random_values(router.num_experts * c.hidden, 21);
  const Backend& backend = backend_for(Device{});
  const ExpertStack stack = p.layer.stack(&backend);
  Context context = poisoned_context(backend, Precision::Exact);
  LayerCase call{.layer = p.ref(stack), .x = p.x.view()};
  call.layer.router = &router;
  call.layer.router_weight = &weight;
  Workspace workspace(workspace_bytes(context, call.layer, router.top_k, c.tokens));
  Tensor y(DType::F32, c.tokens, c.hidden);
  const ForwardIo io = call.io(y.view());
  moe_forward(context, call.layer, io, workspace);
  const std::vector<std::byte> whole = y.bytes;
  std::ranges::fill(y.bytes, std::byte{0xFF});
  InParts parts(context, call.layer, io, workspace);
  parts.run();
  EXPECT_EQ(y.bytes, whole);
  if (c.tokens == 0) return;
  // What is no row of an expert is refused, before anything is written.
  ForwardIo wrong = io;
  std::ranges::fill(y.bytes, std::byte{0xFF});
  EXPECT_THROW(moe_expert_rows(context, call.layer, wrong, parts.rows.view(), workspace),
               ConfigError);
  wrong.routing = parts.routing.view();
  Tensor fewer(DType::F32, c.tokens * router.top_k - 1, c.hidden);
  EXPECT_THROW(moe_finish(context, call.layer, wrong, fewer.view(), workspace), ShapeError);
  EXPECT_THROW(moe_route(context, call.layer, wrong, workspace), ConfigError);
  EXPECT_TRUE(std::ranges::all_of(y.bytes, [](std::byte b) { return b == std::byte{0xFF}; }));
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
      if (backend->device_type() != DeviceType::Cpu) continue;
      InParts parts(context, call.layer, io, workspace);
      parts.run();
      EXPECT_EQ(test::count_allocations([&] { parts.run(); }), 0) << "in three calls";
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
