#pragma once

/// CPU limits that a container sets through control groups.

#include <filesystem>
#include <optional>

namespace moesaic {

/// CPUs (quota over period) that the control group of this process and its parents allow, version 1
/// or 2; empty without a limit. `memberships` is /proc/self/cgroup, `mount` is /sys/fs/cgroup.
std::optional<double> cgroup_cpu_limit(const std::filesystem::path& memberships,
                                       const std::filesystem::path& mount);

}  // namespace moesaic
