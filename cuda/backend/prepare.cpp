#include "cuda/backend/prepare.hpp"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

#include "base/first_error.hpp"
#include "cuda/formats/pack.hpp"
#include "moesaic/error.hpp"
#include "moesaic/thread_pool.hpp"
#include "weights/load.hpp"

namespace moesaic::cuda {
namespace {

using Memory = std::shared_ptr<void>;

Memory allocate(const std::shared_ptr<const Gpu>& gpu, std::size_t bytes) {
  return {gpu->allocate(bytes), [gpu](void* memory) { gpu->deallocate(memory); }};
}

Memory upload(const std::shared_ptr<const Gpu>& gpu, const void* from, std::size_t bytes) {
  Memory memory = allocate(gpu, bytes);
  gpu->upload(memory.get(), from, bytes);
  return memory;
}

std::shared_ptr<const float> upload(const std::shared_ptr<const Gpu>& gpu,
                                    const std::shared_ptr<const std::vector<float>>& values) {
  if (values == nullptr) return nullptr;
  return std::static_pointer_cast<const float>(
      std::shared_ptr<const void>(upload(gpu, values->data(), values->size() * sizeof(float))));
}

void require_packable(const RoleWeights& weights, Role role) {
  const std::string_view refusal = pack_refusal(weights.ref);
  require<UnsupportedError>(refusal.empty(), [&] {
    return Problem{.operation = "load",
                   .what = std::string(name_of(role)) + " weights",
                   .expected = "a type with CUDA kernels",
                   .got = std::string(traits(weights.ref.type).name) + ": " + std::string(refusal),
                   .hint = "dequantize=\"bf16\" or \"f16\" loads any type"};
  });
}

/// What one role, or gate and up together, become.
class Packer {
 public:
  Packer(const std::shared_ptr<const Gpu>& gpu, const LoadOptions& options, std::int64_t total)
      : gpu_(gpu), options_(options), total_(total) {}

  /// `other` null, or the role that shares the units.
  void pack(RoleWeights& weights, RoleWeights* other) {
    const WeightRef from = weights.ref;
    WeightRef to = packed_ref(from, other != nullptr ? UnitHalf::First : UnitHalf::Alone);
    const Memory memory =
        allocate(gpu_, static_cast<std::size_t>(to.num_experts * to.expert_stride));
    upload_experts(weights, other, to, static_cast<std::byte*>(memory.get()));
    to.base = static_cast<const std::byte*>(memory.get());

    std::shared_ptr<const void> owner = memory;
    if (to.int4.gather != nullptr) {
      const std::int64_t copies = to.int4.gather_stride != 0 ? to.num_experts : 1;
      const auto elems =
          static_cast<std::size_t>((copies - 1) * to.int4.gather_stride + to.int4.packed_cols);
      const Memory gather = upload(gpu_, to.int4.gather, elems * sizeof(std::int32_t));
      to.int4.gather = static_cast<const std::int32_t*>(gather.get());
      owner = std::make_shared<const std::pair<Memory, Memory>>(memory, gather);
    }
    if (other != nullptr) {
      WeightRef shared = to;
      shared.half = UnitHalf::Second;
      finish(*other, shared, owner);
    }
    finish(weights, to, std::move(owner));
  }

 private:
  /// Some experts at a time: packed by all threads, then copied at once.
  void upload_experts(const RoleWeights& from, const RoleWeights* second, const WeightRef& to,
                      std::byte* device) {
    const int threads = options_.pool != nullptr ? options_.pool->threads() : 1;
    const std::int32_t batch = std::min(threads, to.num_experts);
    std::vector<std::byte> staging(static_cast<std::size_t>(batch * to.expert_stride));
    std::vector<std::array<std::vector<std::byte>, 2>> read(static_cast<std::size_t>(threads));
    FirstError errors;
    for (std::int32_t first = 0; first < to.num_experts; first += batch) {
      const std::int32_t count = std::min(batch, to.num_experts - first);
      const auto pack_one = [&](std::int64_t i, int thread) {
        errors.during([&] {
          const auto e = first + static_cast<std::int32_t>(i);
          auto& [bytes, second_bytes] = read[static_cast<std::size_t>(thread)];
          const WeightRef one = alone(from, e, bytes);
          const WeightRef two = second != nullptr ? alone(*second, e, second_bytes) : WeightRef{};
          pack_expert(one, second != nullptr ? &two : nullptr, from.read ? 0 : e,
                      staging.data() + i * to.expert_stride);
        });
      };
      if (options_.pool != nullptr) {
        options_.pool->parallel_for(count, pack_one);
      } else {
        for (std::int32_t i = 0; i < count; ++i) pack_one(i, 0);
      }
      errors.rethrow();
      const std::int64_t bytes = count * to.expert_stride;
      gpu_->upload(device + first * to.expert_stride, staging.data(),
                   static_cast<std::size_t>(bytes));
      done_ +=
          count * (from.ref.expert_bytes() + (second != nullptr ? second->ref.expert_bytes() : 0));
      weights::report_progress(options_, done_, total_, "upload");
    }
  }

  /// The experts as they are, or, where they lie in a file, this one read into `bytes`.
  static WeightRef alone(const RoleWeights& weights, std::int32_t e,
                         std::vector<std::byte>& bytes) {
    WeightRef one = weights.ref;
    if (!weights.read) return one;
    bytes.resize(static_cast<std::size_t>(one.rows * one.row_stride));
    weights.read(one.expert(e), bytes);
    one.base = bytes.data();
    one.table = nullptr;
    one.num_experts = 1;
    return one;
  }

  void finish(RoleWeights& weights, const WeightRef& ref, std::shared_ptr<const void> owner) {
    weights.ref = ref;
    weights.owner = std::move(owner);
    weights.read = nullptr;
    weights.device_bias = upload(gpu_, weights.bias);
    weights.device_scale = upload(gpu_, weights.scale);
  }

  const std::shared_ptr<const Gpu>& gpu_;
  const LoadOptions& options_;
  std::int64_t total_;
  std::int64_t done_ = 0;
};

}  // namespace

void prepare(const std::shared_ptr<const Gpu>& gpu, ExpertStack::Parts& parts,
             const LoadOptions& options) {
  require<UnsupportedError>(options.layout != StackLayout::File, [&] {
    return Problem{.operation = "load",
                   .what = "layout",
                   .expected = "\"auto\" on " + to_string(gpu->device()),
                   .got = "\"file\"",
                   .hint = "the kernels read repacked weights only"};
  });
  RoleWeights gate = parts.gate, up = parts.up, down = parts.down;
  std::int64_t total = 0;
  for (const auto& [role, weights] :
       {std::pair{Role::Gate, &gate}, std::pair{Role::Up, &up}, std::pair{Role::Down, &down}}) {
    if (!weights->ref) continue;
    require_packable(*weights, role);
    total += weights->ref.num_experts * weights->ref.expert_bytes();
  }
  Packer packer(gpu, options, total);
  if (gate.ref && can_share_units(gate.ref, up.ref)) {
    packer.pack(gate, &up);
  } else {
    for (RoleWeights* const role : {&gate, &up}) {
      if (role->ref) packer.pack(*role, nullptr);
    }
  }
  if (down.ref) packer.pack(down, nullptr);
  for (const RoleWeights* const role : {&gate, &up, &down}) gpu->load_products(role->ref);

  for (RoleReport& report : parts.report.roles) {
    const WeightRef& ref = (report.role == Role::Gate ? gate
                            : report.role == Role::Up ? up
                                                      : down)
                               .ref;
    report.decision = "repacked";
    report.reason = "units of 16 rows on " + to_string(gpu->device());
    // Shared units count half to each role.
    report.bytes = ref.num_experts * ref.expert_stride / (ref.half == UnitHalf::Alone ? 1 : 2);
  }
  parts.gate = std::move(gate);
  parts.up = std::move(up);
  parts.down = std::move(down);
  parts.device = gpu->device();
  // The host's copies would only double the memory.
  parts.gate_up_marlin = nullptr;
  parts.down_marlin = nullptr;
}

}  // namespace moesaic::cuda
