#include <string>

#include "moesaic/error.hpp"
#include "moesaic/offload.hpp"

namespace moesaic {

std::int64_t RoleView::expert_stride() const {
  return ref_.type == QuantType::F32 ? k() * n() : ref_.expert_bytes();
}

std::span<const std::byte> RoleView::expert_slice(std::int32_t expert) const {
  require<ShapeError>(expert >= 0 && expert < ref_.num_experts, [&] {
    return Problem{.operation = "RoleView.expert_slice",
                   .what = "expert",
                   .expected = "0 to " + std::to_string(ref_.num_experts - 1),
                   .got = std::to_string(expert),
                   .hint = {}};
  });
  require<UnsupportedError>(ref_.slot_map == nullptr || ref_.slot_map[expert] >= 0, [] {
    return Problem{.operation = "RoleView.expert_slice",
                   .what = "expert",
                   .expected = "one in memory or in a mapped file",
                   .got = "one that only calls read, in the form of its checkpoint",
                   .hint = "ExpertStack.load_from_safetensors loads some experts"};
  });
  return {ref_.expert(expert), static_cast<std::size_t>(ref_.expert_bytes())};
}

std::span<const std::byte> RoleView::as_slice() const {
  const bool together =
      ref_.base != nullptr && ref_.slot_map == nullptr && ref_.expert_stride == ref_.expert_bytes();
  require<UnsupportedError>(together, [] {
    return Problem{
        .operation = "RoleView.as_slice",
        .what = "experts",
        .expected = "one behind the other",
        .got = "apart (one tensor per expert, or gate and up in one), or in a checkpoint",
        .hint = "take expert_slice of each"};
  });
  return {ref_.base, static_cast<std::size_t>(ref_.num_experts * ref_.expert_stride)};
}

}  // namespace moesaic
