#include "int4/to_device.hpp"

#include <utility>

#include "moesaic/backend.hpp"
#include "moesaic/marlin_stack.hpp"

namespace moesaic {
namespace int4 {

RoleWeights to_device(const RoleWeights& panels, const LoadOptions& options) {
  // Backends prepare whole stacks, so the panels become the down role of one.
  ExpertStack::Parts parts;
  parts.shape = {panels.ref.num_experts, panels.ref.rows, panels.ref.cols};
  parts.down = panels;
  options.backend->prepare(parts, options);
  return std::move(parts.down);
}

}  // namespace int4

Device MarlinExpertStack::device() const {
  return backend_ != nullptr ? backend_->device() : Device{};
}

std::int64_t MarlinExpertStack::nbytes() const {
  return num_experts() * kernel_weights().ref.expert_stride;
}

MarlinExpertStack MarlinExpertStack::to(const LoadOptions& options) const {
  const Backend* const backend = options.backend;
  const bool on_host = backend == nullptr || backend->device_type() == DeviceType::Cpu;
  MarlinExpertStack stack = *this;
  stack.device_weights_ = on_host ? RoleWeights{} : int4::to_device(weights_, options);
  stack.backend_ = on_host ? nullptr : backend;
  return stack;
}

}  // namespace moesaic
