#include "weights/reencode.hpp"

#include <utility>

#include "base/pages.hpp"
#include "base/sizes.hpp"
#include "cpu/pack.hpp"

namespace moesaic::weights {

void check_on_host(const char* operation, const ExpertStack& stack) {
  require<UnsupportedError>(stack.device().type == DeviceType::Cpu, [&] {
    return Problem{.operation = operation,
                   .what = "experts",
                   .expected = "weights on the CPU",
                   .got = to_string(stack.device()),
                   .hint = "edit first, then load for the device"};
  });
}

std::int64_t role_bytes(const RoleWeights& weights) {
  const WeightRef& ref = weights.ref;
  const bool panels = ref.layout == WeightLayout::Panels && ref.type != QuantType::INT4;
  const std::int64_t expert_bytes =
      panels ? (ref.rows + cpu::kPanelRows - 1) / cpu::kPanelRows * ref.row_stride
             : ref.expert_bytes();
  std::int64_t bytes = ref.num_experts * expert_bytes;
  if (weights.delta != nullptr) {
    const std::size_t values = weights.delta->a.size() + weights.delta->b.size();
    bytes += static_cast<std::int64_t>(values * sizeof(float));
  }
  return bytes;
}

RoleWeights allocate_rows(QuantType type, std::int32_t experts, std::int64_t rows,
                          std::int64_t cols) {
  RoleWeights weights;
  WeightRef& ref = weights.ref;
  ref.type = type;
  ref.num_experts = experts;
  ref.rows = rows;
  ref.cols = cols;
  ref.row_stride = row_bytes(type, cols);
  const std::int64_t bytes = product_of({experts, rows, ref.row_stride}, "ExpertStack", "weights");
  ref.expert_stride = rows * ref.row_stride;
  const std::shared_ptr<std::byte> memory = allocate_pages(static_cast<std::size_t>(bytes));
  ref.base = memory.get();
  weights.owner = memory;
  return weights;
}

ExpertStack finish_like(const ExpertStack& model, ExpertStack::Parts parts,
                        const LoadOptions& options, Clock::time_point start) {
  LoadOptions own = options;
  const auto in_panels = [](const RoleWeights& role) {
    return role.ref.layout == WeightLayout::Panels;
  };
  const bool panels = in_panels(model.gate()) || in_panels(model.up()) || in_panels(model.down());
  own.layout = panels ? StackLayout::Auto : StackLayout::File;
  return finish(std::move(parts), own, start);
}

}  // namespace moesaic::weights
