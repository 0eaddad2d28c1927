/// Stacks that hold some experts of a model, which go by their ids in it: what expert parallelism
/// gives to each rank.

#include <algorithm>
#include <memory>
#include <string>
#include <utility>

#include "moesaic/backend.hpp"
#include "weights/load.hpp"

namespace moesaic::weights {
namespace {

using SlotList = std::shared_ptr<const std::vector<std::int32_t>>;

/// What keeps a role in memory, and the map that its reference points to.
struct KeptOwners {
  std::shared_ptr<const void> weights;
  SlotList slots;
  std::vector<std::int32_t> gather;  ///< column orders by id, where experts have their own
};

/// Values [n, width] of the kept experts as [E, width]; the others have `missing`.
std::shared_ptr<const std::vector<float>> by_id(
    const std::shared_ptr<const std::vector<float>>& values, std::int64_t width, float missing,
    const KeptExperts& kept) {
  if (values == nullptr) return nullptr;
  std::vector<float> all(static_cast<std::size_t>(kept.num_experts * width), missing);
  for (std::size_t i = 0; i < kept.ids.size(); ++i) {
    std::copy_n(values->begin() + static_cast<std::ptrdiff_t>(i) * width, width,
                all.begin() + kept.ids[i] * width);
  }
  return std::make_shared<const std::vector<float>>(std::move(all));
}

void go_by_id(RoleWeights& role, const KeptExperts& kept, const SlotList& slots) {
  if (!role.ref) return;
  const auto owners = std::make_shared<KeptOwners>(KeptOwners{std::move(role.owner), slots, {}});
  WeightRef& ref = role.ref;
  // Kernels look up columns by the id of an expert, and only its weights by slot.
  if (Int4Format& format = ref.int4; format.gather_stride != 0) {
    owners->gather.resize(static_cast<std::size_t>(kept.num_experts * format.packed_cols), -1);
    for (std::int32_t i = 0; i < kept.count(); ++i) {
      std::copy_n(
          format.gather_of(i), format.packed_cols,
          owners->gather.begin() + kept.ids[static_cast<std::size_t>(i)] * format.packed_cols);
    }
    format.gather = owners->gather.data();
    format.gather_stride = format.packed_cols;
  }
  ref.num_experts = kept.num_experts;
  ref.slot_map = slots->data();
  role.owner = owners;
  role.bias = by_id(role.bias, ref.rows, 0.0F, kept);
  role.scale = by_id(role.scale, 1, 1.0F, kept);
}

}  // namespace

KeptExperts keep_experts(const char* operation, std::vector<std::int32_t> ids,
                         std::int32_t num_experts) {
  std::ranges::sort(ids);
  const auto problem = [&](std::string expected, std::int32_t got) {
    return Problem{.operation = operation,
                   .what = "experts",
                   .expected = std::move(expected),
                   .got = std::to_string(got),
                   .hint = {}};
  };
  for (const std::int32_t id : ids) {
    require<ShapeError>(id >= 0 && id < num_experts, [&] {
      return problem("ids of 0 to " + std::to_string(num_experts - 1), id);
    });
  }
  const auto twice = std::ranges::adjacent_find(ids);
  require<ShapeError>(twice == ids.end(), [&] { return problem("each id once", *twice); });
  return {num_experts, std::move(ids)};
}

std::shared_ptr<const std::vector<float>> values_of_kept(
    const std::shared_ptr<const std::vector<float>>& values, std::int64_t width,
    const KeptExperts& kept) {
  if (values == nullptr) return nullptr;
  std::vector<float> some;
  some.reserve(kept.ids.size() * static_cast<std::size_t>(width));
  for (const std::int32_t id : kept.ids) {
    const auto begin = values->begin() + id * width;
    some.insert(some.end(), begin, begin + width);
  }
  return std::make_shared<const std::vector<float>>(std::move(some));
}

ExpertStack finish_kept(ExpertStack::Parts parts, const KeptExperts& kept,
                        const LoadOptions& options, Clock::time_point start) {
  const Backend* const backend = options.backend;
  require<UnsupportedError>(backend == nullptr || backend->device_type() == DeviceType::Cpu, [&] {
    return Problem{.operation = "load",
                   .what = "experts",
                   .expected = "all of them on " + to_string(backend->device()),
                   .got = std::to_string(kept.count()) + " of " + std::to_string(kept.num_experts),
                   .hint = "only the CPU runs layers that keep some experts"};
  });
  parts.shape.num_experts = kept.count();
  // Without experts there is nothing to check or to prepare.
  if (kept.count() > 0) parts = parts_of(finish(std::move(parts), options, start));
  auto slots =
      std::make_shared<std::vector<std::int32_t>>(static_cast<std::size_t>(kept.num_experts), -1);
  for (std::int32_t i = 0; i < kept.count(); ++i) {
    (*slots)[static_cast<std::size_t>(kept.ids[static_cast<std::size_t>(i)])] = i;
  }
  for (RoleWeights* role : {&parts.gate, &parts.up, &parts.down}) go_by_id(*role, kept, slots);
  parts.shape.num_experts = kept.num_experts;
  parts.gate_up_marlin = parts.down_marlin = nullptr;
  return ExpertStack(std::move(parts));
}

}  // namespace moesaic::weights
