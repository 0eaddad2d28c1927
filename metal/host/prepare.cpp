#include "metal/host/prepare.hpp"

#include <algorithm>
#include <cstring>
#include <span>
#include <string>

#include "metal/dispatch_shape.hpp"
#include "moesaic/error.hpp"

namespace moesaic::metal {
namespace {

struct NamedWeights {
  Role role;
  RoleWeights* weights;
};

std::string kernel_types() {
  std::string names;
#define MOESAIC_METAL_FORMAT(type, suffix) \
  names += (names.empty() ? "" : ", ") + std::string(#type);
#include "metal/kernels.inc"
  return names;
}

void check_type(const NamedWeights& named) {
  const WeightRef& ref = named.weights->ref;
  require<UnsupportedError>(has_kernels(ref.type) && ref.layout == WeightLayout::Rows, [&] {
    return Problem{"metal", std::string(name_of(named.role)) + " weights", kernel_types(),
                   ref.layout == WeightLayout::Rows ? std::string(traits(ref.type).name)
                                                    : "weights packed for another backend",
                   "load with dequantize = F16, or run the layer on the CPU"};
  });
}

RoleReport* report_of(ExpertStack::Parts& parts, Role role) {
  const auto found = std::ranges::find(parts.report.roles, role, &RoleReport::role);
  return found != parts.report.roles.end() ? &*found : nullptr;
}

/// One owner that keeps both alive.
std::shared_ptr<const void> joined(std::shared_ptr<const void> a, std::shared_ptr<const void> b) {
  using Both = std::pair<std::shared_ptr<const void>, std::shared_ptr<const void>>;
  return std::make_shared<const Both>(std::move(a), std::move(b));
}

/// The experts one behind the other in Metal memory.
void copy_role(const Backend& backend, RoleWeights& weights) {
  WeightRef& ref = weights.ref;
  const std::int64_t expert_bytes = ref.rows * ref.row_stride;
  const auto bytes = static_cast<std::size_t>(ref.num_experts * expert_bytes);
  const std::shared_ptr<void> memory(backend.allocate(bytes),
                                     [&backend, bytes](void* p) { backend.deallocate(p, bytes); });
  auto* const to = static_cast<std::byte*>(memory.get());
  for (std::int32_t e = 0; e < ref.num_experts; ++e) {
    const std::span out(to + e * expert_bytes, static_cast<std::size_t>(expert_bytes));
    if (weights.read) {
      weights.read(ref.expert(e), out);
    } else {
      std::memcpy(out.data(), ref.expert(e), out.size());
    }
  }
  ref.base = to;
  ref.table = nullptr;
  ref.expert_stride = expert_bytes;
  weights.owner = memory;
  weights.read = nullptr;
}

void hold_role(const Backend& backend, Memory& memory, ExpertStack::Parts& parts,
               const NamedWeights& named) {
  RoleWeights& weights = *named.weights;
  const WeightRef& ref = weights.ref;
  RoleReport* const report = report_of(parts, named.role);
  const auto bytes = static_cast<std::size_t>(ref.num_experts * ref.expert_stride);
  if (ref.base == nullptr || !memory.holds(ref.base, bytes)) {
    std::shared_ptr<const void> adopted;
    const bool mapped = report != nullptr && report->decision == "mapped" && ref.base != nullptr;
    if (mapped) adopted = memory.adopt(ref.base, bytes);
    if (adopted != nullptr) {
      // The pair destroys its second member first, so the buffer goes before the pages it views.
      weights.owner = joined(weights.owner, adopted);
    } else {
      require<OutOfMemoryError>(bytes <= memory.max_bytes(), [&] {
        return Problem{"metal", std::string(name_of(named.role)) + " weights",
                       "at most " + std::to_string(memory.max_bytes()) + " bytes, one buffer",
                       std::to_string(bytes), "run the layer on the CPU"};
      });
      copy_role(backend, weights);
      if (report != nullptr) {
        report->decision = "copied";
        report->reason = mapped ? "Metal refused a buffer over the pages of the file"
                                : "kernels read Metal memory";
      }
    }
  }
  if (auto resident = memory.keep_resident(weights.ref.base)) {
    weights.owner = joined(weights.owner, std::move(resident));
  }
  const auto upload = [&](const std::shared_ptr<const std::vector<float>>& values) {
    if (values == nullptr) return std::shared_ptr<const float>();
    const std::shared_ptr<void> copy =
        backend.upload(values->data(), values->size() * sizeof(float));
    return std::shared_ptr<const float>(copy, static_cast<const float*>(copy.get()));
  };
  weights.device_bias = upload(weights.bias);
  weights.device_scale = upload(weights.scale);
}

}  // namespace

void hold_roles(const Backend& backend, Memory& memory, ExpertStack::Parts& parts,
                const LoadOptions& options) {
  std::vector<NamedWeights> given;
  for (const NamedWeights named :
       {NamedWeights{Role::Gate, &parts.gate}, NamedWeights{Role::Up, &parts.up},
        NamedWeights{Role::Down, &parts.down}}) {
    if (named.weights->ref) given.push_back(named);
  }
  for (const NamedWeights& named : given) check_type(named);
  std::int64_t total = 0, done = 0;
  for (const NamedWeights& named : given)
    total += named.weights->ref.expert_bytes() * named.weights->ref.num_experts;
  for (const NamedWeights& named : given) {
    const std::string what = std::string(name_of(named.role)) + " to Metal memory";
    if (options.progress && !options.progress({done, total, what})) {
      throw OperationCancelled("load: cancelled");
    }
    hold_role(backend, memory, parts, named);
    done += named.weights->ref.expert_bytes() * named.weights->ref.num_experts;
  }
  parts.device = backend.device();
}

}  // namespace moesaic::metal
