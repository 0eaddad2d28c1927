// A program outside the tree: routes three tokens and runs a small dense layer.

#include <cmath>
#include <iostream>
#include <moesaic/moesaic.hpp>
#include <vector>

int main() {
  constexpr int kTokens = 3, kHidden = 64, kInner = 32, kExperts = 4, kTopK = 2;
  const std::vector<float> gate(kExperts * kInner * kHidden, 0.01F), up = gate, down = gate;
  const std::vector<float> x(kTokens * kHidden, 1.0F);
  const std::vector<float> logits{3, 1, 2, 0, 0, 1, 2, 3, 1, 1, 1, 1};
  std::vector<float> y(x.size(), NAN);

  using moesaic::ConstTensorView, moesaic::DType;
  const auto stack = moesaic::ExpertStack::from_dense_stacks(
      ConstTensorView(gate.data(), DType::F32, {kExperts, kInner, kHidden}),
      ConstTensorView(up.data(), DType::F32, {kExperts, kInner, kHidden}),
      ConstTensorView(down.data(), DType::F32, {kExperts, kHidden, kInner}));
  moesaic::RouterConfig router;
  router.num_experts = kExperts;
  router.top_k = kTopK;

  moesaic::LayerRef layer;
  layer.stack = &stack;
  layer.router = &router;
  moesaic::ForwardIo io;
  io.x = ConstTensorView(x.data(), DType::F32, {kTokens, kHidden});
  io.logits = ConstTensorView(logits.data(), DType::F32, {kTokens, kExperts});
  io.out = moesaic::TensorView(y.data(), DType::F32, {kTokens, kHidden});
  moesaic::Context context;
  moesaic::Workspace workspace(moesaic::workspace_bytes(context, layer, kTopK, kTokens));
  moesaic::moe_forward(context, layer, io, workspace);

  // Every expert is the same, and renormalised weights sum to 1.
  const double gated = 0.64 / (1.0 + std::exp(-0.64)) * 0.64, expected = kInner * 0.01 * gated;
  for (const float value : y) {
    if (!(std::abs(value - expected) < 1e-4 * expected)) {
      std::cerr << "got " << value << ", expected " << expected << '\n';
      return 1;
    }
  }
  std::cout << "consumer: ok, y = " << y[0] << '\n';
}
