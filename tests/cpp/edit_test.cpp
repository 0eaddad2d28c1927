// Stacks made of the experts of others: every weight type, both layouts, bytes and results exactly.

#include "moesaic/edit.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "layers.hpp"
#include "run_case.hpp"

namespace moesaic::testing {
namespace {

constexpr std::int32_t kExperts = 2;
constexpr std::int64_t kHidden = 256, kWidth = 256;

std::vector<std::byte> encoded(const ExpertStack& stack, Role role, std::int32_t expert) {
  const WeightRef& ref = stack.role(role).ref;
  const auto bytes = static_cast<std::size_t>(row_bytes(ref.type, ref.cols));
  std::vector<std::byte> out(static_cast<std::size_t>(ref.rows) * bytes);
  for (std::int64_t row = 0; row < ref.rows; ++row) {
    encoded_expert_row(ref, expert, row, out.data() + static_cast<std::size_t>(row) * bytes);
  }
  return out;
}

struct Edited : ::testing::TestWithParam<std::tuple<QuantType, StackLayout>> {
  QuantType type = std::get<0>(GetParam());
  LoadOptions options;
  TestLayer layer{{"edited", 3, kHidden, kWidth, kExperts, 2, type, type, type,
                   RoutingShape::Uniform, ActivationKind::SwiGlu, true}};

  Edited() {
    options.backend = &backend_for(Device{});
    options.layout = std::get<1>(GetParam());
    add_delta(layer.down, 2, 5);
  }
  ExpertStack stack() const { return layer.stack(options.backend, options.layout); }
};

std::vector<QuantType> types_with_kernels() {
  std::vector<QuantType> types;
  const std::vector<KernelInfo> kernels = backend_for(Device{}).kernels();
  for (const QuantTraits& facts : quant_table()) {
    if (std::ranges::find(kernels, facts.type, &KernelInfo::type) != kernels.end())
      types.push_back(facts.type);
  }
  return types;
}

INSTANTIATE_TEST_SUITE_P(Types, Edited,
                         ::testing::Combine(::testing::ValuesIn(types_with_kernels()),
                                            ::testing::Values(StackLayout::Auto,
                                                              StackLayout::File)),
                         [](const auto& info) {
                           return std::string(traits(std::get<0>(info.param)).name) +
                                  (std::get<1>(info.param) == StackLayout::File ? "_rows"
                                                                                : "_panels");
                         });

TEST_P(Edited, RowsComeBackAsTheFileHadThem) {
  const ExpertStack made = stack();
  for (const auto& [role, source] :
       {std::pair{Role::Gate, &layer.gate}, std::pair{Role::Up, &layer.up},
        std::pair{Role::Down, &layer.down}}) {
    const std::size_t size = source->bytes->size() / kExperts;
    for (std::int32_t e = 0; e < kExperts; ++e) {
      const auto from = source->bytes->begin() + static_cast<std::ptrdiff_t>(size) * e;
      EXPECT_EQ(encoded(made, role, e), std::vector<std::byte>(from, from + size));
    }
  }
}

TEST_P(Edited, ChosenExpertsGiveWhatTheyGave) {
  std::optional<ExpertStack> made = stack();
  const std::int32_t ids[] = {1, 0, 1};
  std::vector<ExpertSource> sources;
  for (const std::int32_t e : ids) sources.push_back({&*made, e});
  const ExpertStack few = gather_experts(sources);

  Context context = poisoned_context(backend_for(Device{}));
  static_assert(kHidden == kWidth);
  const Floats x = random_values(3 * kHidden, 8);
  std::vector<Floats> want;
  const auto product = [&](const RoleWeights& weights, std::vector<std::int32_t> experts) {
    return run_case(context, ProductCase{.weights = &weights,
                                         .x = dense_rows(x, kHidden),
                                         .experts = std::move(experts)});
  };
  constexpr Role kRoles[] = {Role::Gate, Role::Up, Role::Down};
  for (const Role role : kRoles) want.push_back(product(made->role(role), {1, 0, 1}));
  made.reset();  // what was chosen keeps its memory
  for (std::size_t i = 0; i < 3; ++i) {
    EXPECT_EQ(product(few.role(kRoles[i]), {0, 1, 2}), want[i]) << name_of(kRoles[i]);
  }
}

TEST_P(Edited, AnotherExpertLeavesTheRest) {
  const ExpertStack made = stack();
  ExpertEdit edit;
  edit.up.encoded = encoded(made, Role::Up, 0);
  edit.down.bias = random_values(kHidden, 7);
  edit.gate.scale = 3.0F;
  const ExpertStack other = with_expert(made, 1, edit, options);
  for (const Role role : {Role::Gate, Role::Up, Role::Down}) {
    for (std::int32_t e = 0; e < kExperts; ++e) {
      const bool changed = role == Role::Up && e == 1;
      EXPECT_EQ(encoded(other, role, e), encoded(made, role, changed ? 0 : e));
    }
    EXPECT_EQ(other.role(role).ref.layout, made.role(role).ref.layout);
  }
  Floats bias = *made.down().bias, scale = *made.gate().scale;
  std::ranges::copy(edit.down.bias, bias.begin() + kHidden);
  scale[1] = 3.0F;
  EXPECT_EQ(*other.down().bias, bias);
  EXPECT_EQ(*other.gate().scale, scale);
  EXPECT_EQ(*other.up().bias, *made.up().bias);
  EXPECT_EQ(other.down().delta->a, made.down().delta->a);
  EXPECT_EQ(other.down().delta->b, made.down().delta->b);
}

TEST_P(Edited, BakedDeltasAreInTheMatrix) {
  const ExpertStack made = stack();
  const ExpertStack baked =
      bake_deltas(made, {.gate = {}, .up = {}, .down = QuantType::F32}, options);
  EXPECT_EQ(baked.down().delta, nullptr);
  EXPECT_EQ(baked.up().ref.base, made.up().ref.base);
  const LowRankDelta& delta = *made.down().delta;
  const WeightRef& ref = made.down().ref;
  const Floats before = decode_role(made.down()), after = decode_role(baked.down());
  Floats want(after.size());
  for (std::int64_t e = 0; e < kExperts; ++e) {
    const auto scale = static_cast<double>((*made.down().scale)[static_cast<std::size_t>(e)]);
    for (std::int64_t row = 0; row < ref.rows; ++row) {
      for (std::int64_t col = 0; col < ref.cols; ++col) {
        double sum = 0;
        for (std::int64_t r = 0; r < delta.rank; ++r) {
          const auto b = static_cast<std::size_t>((e * ref.rows + row) * delta.rank + r);
          const auto a = static_cast<std::size_t>((e * delta.rank + r) * ref.cols + col);
          sum += static_cast<double>(delta.b[b]) * static_cast<double>(delta.a[a]);
        }
        const auto at = static_cast<std::size_t>((e * ref.rows + row) * ref.cols + col);
        want[at] = static_cast<float>(static_cast<double>(before[at]) +
                                      static_cast<double>(delta.scale) * sum / scale);
      }
    }
  }
  EXPECT_LE(rel_l2(after, Doubles(want.begin(), want.end())), 1e-6);
}

TEST(Edits, DeltasStayOffDevices) {
  constexpr QuantType kType = QuantType::F32;
  const TestLayer layer({"on the host", 1, 64, 64, 2, 1, kType, kType, kType});
  ExpertStack::Parts parts = layer.parts();
  LowRankDelta delta;
  delta.rank = 1;
  delta.a.resize(2 * 64);
  delta.b.resize(2 * 64);
  parts.up.delta = std::make_shared<const LowRankDelta>(delta);
  EXPECT_NO_THROW(ExpertStack{parts});
  parts.device = {DeviceType::Cuda, 0};
  EXPECT_THROW(ExpertStack{parts}, UnsupportedError);
  parts.device = {};
  delta.b.pop_back();
  parts.up.delta = std::make_shared<const LowRankDelta>(delta);
  EXPECT_THROW(ExpertStack{parts}, ShapeError);
}

}  // namespace
}  // namespace moesaic::testing
