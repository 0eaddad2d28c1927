// Calls that must be refused: each says what is wrong and leaves the output alone.

#include <gtest/gtest.h>

#include <string>

#include "forward_problem.hpp"

namespace moesaic::testing {
namespace {

/// A good call, which a test spoils.
class BadCall : public ::testing::Test {
 protected:
  Case shape = case_named("odd_sizes");
  Problem p{shape};
  ExpertStack stack = p.layer.stack();
  FakeBackend backend;
  Context context = poisoned_context(backend, Precision::Auto, 1);
  LayerRef layer = p.ref(stack);
  Tensor& x = p.x;
  Tensor y{DType::F32, shape.tokens, shape.hidden};
  ForwardIo io = p.on(stack).io(y.view());
  Workspace workspace{workspace_bytes(context, layer, shape.top_k, shape.tokens)};

  template <class E>
  void expect(const std::string& part) {
    const std::vector<std::byte> before = y.bytes;
    for (const bool reference : {false, true}) {
      try {
        if (reference) {
          moe_forward_cpu(layer, io);
        } else {
          moe_forward(context, layer, io, workspace);
        }
        ADD_FAILURE() << "no error for " << part;
      } catch (const E& error) {
        const std::string text = error.what();
        EXPECT_NE(text.find(part), std::string::npos) << text;
        EXPECT_NE(text.find("moe_forward"), std::string::npos) << text;
        EXPECT_NE(text.find("expected"), std::string::npos) << text;
      }
    }
    EXPECT_EQ(y.bytes, before);
  }
};

TEST_F(BadCall, ShapesAndStrides) {
  io.x = TensorView(x.bytes.data(), DType::F32, {shape.tokens, shape.hidden - 1});
  expect<ShapeError>("x.shape");
  io.x = x.view();
  io.out = TensorView(y.bytes.data(), DType::F32, {shape.tokens - 1, shape.hidden});
  expect<ShapeError>("out.shape");
  TensorView flipped = y.view();
  flipped.strides = {1, shape.tokens};
  io.out = flipped;
  expect<ShapeError>("out.strides");
  TensorView onto_itself = y.view();
  onto_itself.strides[0] = 0;
  io.out = onto_itself;
  expect<ShapeError>("out.strides");
  io.out = TensorView(nullptr, DType::F32, {shape.tokens, shape.hidden});
  expect<ShapeError>("out.data");
  io.out = y.view();
  io.x = y.view();
  expect<ShapeError>("out");
}

TEST_F(BadCall, DTypesAndDevices) {
  io.x.dtype = DType::F64;
  expect<DTypeError>("x.dtype");
  io.x = x.view();
  io.out.dtype = DType::I32;
  expect<DTypeError>("out.dtype");
  io.out = y.view();
  io.out.device = {DeviceType::Cuda, 0};
  expect<DeviceError>("out.device");
}

TEST_F(BadCall, Routing) {
  p.routing.topk_ids()[4] = shape.experts;
  expect<ShapeError>(std::to_string(shape.experts));
  p.routing.topk_ids()[4] = -2;
  expect<ShapeError>("-2");
  io.routing = {};
  expect<ConfigError>("router");
  RouterConfig router = plain_router(shape);
  layer.router = &router;
  expect<ShapeError>("router weight");
  const Floats logits = random_values(shape.tokens * shape.experts, 5);
  io.logits = ConstTensorView(logits.data(), DType::F32, {shape.tokens, shape.experts - 1});
  expect<ShapeError>("router_logits.shape");
  io.logits = ConstTensorView(logits.data(), DType::F16, {shape.tokens, shape.experts});
  expect<DTypeError>("router_logits.dtype");
  io.logits = ConstTensorView(logits.data(), DType::F32, {shape.tokens, shape.experts});
  router.num_experts += 1;
  expect<ShapeError>("router.num_experts");
}

TEST_F(BadCall, ActivationWithoutItsTensor) {
  layer.activation.kind = ActivationKind::ReluSquared;
  expect<ShapeError>("gate tensor");
}

TEST_F(BadCall, UnsupportedWeights) {
  backend.refused = shape.down;
  try {
    moe_forward(context, layer, io, workspace);
    ADD_FAILURE();
  } catch (const UnsupportedError& error) {
    EXPECT_NE(std::string(error.what()).find("down"), std::string::npos) << error.what();
  }
  EXPECT_TRUE(std::isnan(y.get(0)));
}

}  // namespace
}  // namespace moesaic::testing
