#include "ops/check_workspace.hpp"

#include <string>

#include "moesaic/error.hpp"

namespace moesaic::ops {

void check_workspace(const char* operation, Context& context, Workspace& workspace,
                     std::size_t bytes, std::int64_t count, const char* things) {
  // Other devices reach the host's memory too.
  const Device device = context.backend().device();
  require<WorkspaceError>(device.type != DeviceType::Cuda || workspace.device() == device, [&] {
    return Problem{.operation = operation,
                   .what = "workspace",
                   .expected = "memory on " + to_string(device),
                   .got = to_string(workspace.device()),
                   .hint = "Workspace(bytes, backend)"};
  });
  require<WorkspaceError>(workspace.size() >= bytes, [&] {
    return Problem{.operation = operation,
                   .what = "workspace",
                   .expected = "at least " + std::to_string(bytes) + " bytes for " +
                               std::to_string(count) + " " + things,
                   .got = std::to_string(workspace.size()),
                   .hint = "Workspace.for_layer and Workspace.for_matrix make one"};
  });
  // 0xFF in every byte is NaN in f32 and -1 in int32.
  if (context.tuning().poison) {
    context.backend().fill(
        context,
        {.data = workspace.data(), .bytes = static_cast<std::int64_t>(bytes), .value = 0xFF});
  }
}

}  // namespace moesaic::ops
