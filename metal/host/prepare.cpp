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

/// INT4 panels have rows side by side.
constexpr std::int64_t kPanelRows = 16;

/// Bytes from the begin of an expert to its end.
std::int64_t extent_of(const WeightRef& ref) {
  const std::int64_t rows =
      ref.layout == WeightLayout::Panels ? (ref.rows + kPanelRows - 1) / kPanelRows : ref.rows;
  return rows * ref.row_stride;
}

/// Bytes from the first expert's begin to the last one's end, where they lie as far apart as they do:
/// of two roles that share their memory each has the same stride, and not the same begin.
std::size_t span_of(const WeightRef& ref) {
  return ref.num_experts == 0
             ? 0
             : static_cast<std::size_t>((ref.num_experts - 1) * ref.expert_stride + extent_of(ref));
}

void check_role(const NamedWeights& named, std::size_t max_bytes) {
  const WeightRef& ref = named.weights->ref;
  const std::string what = std::string(name_of(named.role)) + " weights";
  const bool fits = ref.layout == kernel_layout(ref.type);
  require<UnsupportedError>(has_kernels(ref.type) && fits, [&] {
    return Problem{"metal", what, kernel_types(),
                   fits ? std::string(traits(ref.type).name) : "weights packed for another backend",
                   "load with dequantize = F16, or run the layer on the CPU"};
  });
  // A kernel takes a role as one buffer. The largest one is a good part of the device's memory, and a
  // role a small part of a model: nothing would be gained by several buffers each.
  const auto bytes = static_cast<std::size_t>(ref.num_experts * extent_of(ref));
  require<OutOfMemoryError>(bytes <= max_bytes, [&] {
    return Problem{"metal", what,
                   "at most " + std::to_string(max_bytes) + " bytes, the device's largest buffer",
                   std::to_string(bytes), "run the layer on the CPU"};
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
  const std::int64_t expert_bytes = extent_of(ref);
  const auto bytes = static_cast<std::size_t>(ref.num_experts * expert_bytes);
  const std::shared_ptr<void> memory(backend.allocate(bytes),
                                     [&backend, bytes](void* p) { backend.deallocate(p, bytes); });
  auto* const to = static_cast<std::byte*>(memory.get());
  for (std::int32_t e = 0; e < ref.num_experts; ++e) {
    const std::span out(to + e * expert_bytes, static_cast<std::size_t>(expert_bytes));
    if (weights.read) {
      weights.read(ref.expert(e), out);
    } else if (ref.shares != nullptr) {
      for (std::int64_t p = 0; p < expert_bytes / ref.row_stride; ++p) {
        std::memcpy(out.data() + p * ref.row_stride, ref.panel(e, p),
                    static_cast<std::size_t>(ref.row_stride));
      }
    } else {
      std::memcpy(out.data(), ref.expert(e), out.size());
    }
  }
  ref.base = to;
  ref.table = nullptr;
  ref.shares = nullptr;
  ref.expert_stride = expert_bytes;
  weights.owner = memory;
  weights.read = nullptr;
}

/// Makes the order of an INT4 role's columns readable by kernels, where the host has it.
std::shared_ptr<const void> hold_gather(Memory& memory, const WeightRef& ref) {
  const Int4Format& int4 = ref.int4;
  if (int4.gather == nullptr) return nullptr;
  const std::int64_t orders = int4.gather_stride != 0 ? ref.num_experts : 1;
  const auto values =
      static_cast<std::size_t>((orders - 1) * int4.gather_stride + int4.packed_cols);
  return memory.mirror(int4.gather, values * sizeof(std::int32_t));
}

void hold_role(const Backend& backend, Memory& memory, ExpertStack::Parts& parts,
               const NamedWeights& named) {
  RoleWeights& weights = *named.weights;
  const WeightRef& ref = weights.ref;
  RoleReport* const report = report_of(parts, named.role);
  if (auto gather = hold_gather(memory, ref)) {
    weights.owner = joined(weights.owner, std::move(gather));
  }
  const std::size_t bytes = span_of(ref);
  std::shared_ptr<const void> adopted;
  // Pages of a file, and panels, which lie in pages of their own. What another stack made known of them
  // goes with that stack.
  const bool mapped = report != nullptr && report->decision == "mapped" && ref.base != nullptr;
  const bool panels = ref.type == QuantType::INT4 && ref.base != nullptr && ref.shares == nullptr;
  if (mapped || panels) adopted = memory.adopt(ref.base, bytes);
  if (adopted != nullptr) {
    // The pair destroys its second member first, so the buffer goes before the pages it views.
    weights.owner = joined(weights.owner, adopted);
  } else if (ref.base == nullptr || !memory.holds(ref.base, bytes)) {
    copy_role(backend, weights);
    if (report != nullptr) {
      report->decision = "copied";
      report->reason = mapped   ? "Metal refused a buffer over the pages of the file"
                       : panels ? "Metal refused a buffer over the panels"
                                : "kernels read Metal memory";
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
  for (const NamedWeights& named : given) check_role(named, memory.max_bytes());
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
