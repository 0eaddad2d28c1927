#pragma once

/// What the tests of the forward share: layers of the case list with inputs for them, the backends
/// they run on, and how close to f64 they must come.

#include <stdexcept>
#include <string>
#include <vector>

#include "fake_backend.hpp"
#include "layers.hpp"
#include "run_case.hpp"

namespace moesaic::testing {

inline constexpr double kReferenceBound = 1e-5;  ///< f32 sums
inline constexpr double kExactBound = 2e-3;      ///< activations as two int8 planes
inline constexpr double kFastBound = 2e-2;       ///< activations as one int8 plane

/// The CPU backend, and one that fuses nothing and has the default phases.
inline std::vector<const Backend*> test_backends() {
  static FakeBackend fake;
  return {&backend_for(Device{}), &fake};
}

inline Case case_named(const std::string& name) {
  for (const Case& c : cases::kCases) {
    if (name == c.name) return c;
  }
  throw std::runtime_error("no case " + name);
}

/// Tests of every case of the list.
class ForwardCase : public ::testing::TestWithParam<Case> {};

/// A case's experts with an input and a ready routing for them.
struct Problem {
  TestLayer layer;
  Floats values;
  Tensor x;
  Routing routing;

  explicit Problem(const Case& c)
      : layer(c),
        values(random_values(c.tokens * c.hidden, 3)),
        x(DType::F32, c.tokens, c.hidden, values),
        routing(make_routing(c)) {}
  const Case& shape() const { return layer.shape; }
  LayerRef ref(const ExpertStack& stack) const {
    LayerRef ref;
    ref.stack = &stack;
    ref.activation = layer.activation;
    return ref;
  }
  LayerCase on(const ExpertStack& stack) {
    return {.layer = ref(stack), .x = x.view(), .routing = routing.view()};
  }
  Doubles want() const { return forward_f64(layer, values, routing); }
};

inline RouterConfig plain_router(const Case& c) {
  RouterConfig router;
  router.num_experts = c.experts;
  router.top_k = c.top_k;
  return router;
}

/// A case's experts with a router of their own and a shared expert, on one backend.
struct FullLayer {
  TestLayer layer, shared_layer;
  ExpertStack stack;
  RouterConfig router;
  Floats router_weight;
  SharedExperts shared;

  static Case shared_case(Case c) {
    c.experts = c.top_k = 1;
    c.intermediate = 96;
    c.gate = c.up = c.down = QuantType::F32;
    return c;
  }
  /// `sigmoid`: the shared expert has a gate.
  FullLayer(const Case& c, const Backend* backend, bool sigmoid)
      : layer(c),
        shared_layer(shared_case(c), 31),
        stack(layer.stack(backend)),
        router(plain_router(c)),
        router_weight(random_values(c.experts * c.hidden, 41, 0.1F)),
        shared{shared_layer.stack(backend), {}} {
    if (sigmoid) shared.gate = random_values(c.hidden, 43, 0.1F);
  }
  LayerRef ref() const {
    LayerRef ref;
    ref.stack = &stack;
    ref.router = &router;
    ref.activation = layer.activation;
    ref.router_weight = &router_weight;
    ref.shared = &shared;
    return ref;
  }
  /// In f64, with the routing that the layer chose.
  Doubles want(const Floats& x, const Routing& routing) const {
    Doubles y = forward_f64(layer, x, routing);
    add_shared_f64(shared_layer, shared.gate, x, y);
    return y;
  }
};

}  // namespace moesaic::testing
