#include "base/cpu_quota.hpp"

#include <algorithm>
#include <cmath>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/topology.hpp"
#include "moesaic/thread_pool.hpp"

namespace moesaic {
namespace {

namespace fs = std::filesystem;

/// Version 2 keeps quota and period in one file: "max 100000" or "200000 100000".
std::optional<double> quota_v2(const fs::path& folder) {
  std::ifstream file(folder / "cpu.max");
  double quota = 0.0;
  double period = 0.0;
  if (file >> quota >> period && quota > 0.0 && period > 0.0) return quota / period;
  return {};
}

/// Version 1 keeps them in two files; a quota of -1 means none.
std::optional<double> quota_v1(const fs::path& folder) {
  std::ifstream quota_file(folder / "cpu.cfs_quota_us");
  std::ifstream period_file(folder / "cpu.cfs_period_us");
  double quota = 0.0;
  double period = 0.0;
  if (quota_file >> quota && period_file >> period && quota > 0.0 && period > 0.0) {
    return quota / period;
  }
  return {};
}

bool names_cpu(const std::string& controllers) {
  return ("," + controllers + ",").find(",cpu,") != std::string::npos;
}

}  // namespace

std::optional<double> cgroup_cpu_limit(const fs::path& memberships, const fs::path& mount) {
  std::optional<double> limit;
  const auto tighten = [&limit](std::optional<double> other) {
    if (other) limit = limit ? std::min(*limit, *other) : *other;
  };
  // Each group is limited by its parents too. Inside a container the path may name a group that the
  // mount does not show; its root, which is the container, is always read.
  const auto walk = [&](const fs::path& root, const std::string& group, auto&& quota) {
    fs::path relative = fs::path(group).relative_path();
    while (!relative.empty()) {
      tighten(quota(root / relative));
      relative = relative.parent_path();
    }
    tighten(quota(root));
  };

  std::ifstream file(memberships);
  std::string line;
  while (std::getline(file, line)) {  // hierarchy:controllers:path
    const std::size_t first = line.find(':');
    const std::size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string group = line.substr(second + 1);
    if (controllers.empty()) {
      walk(mount, group, quota_v2);
      walk(mount / "unified", group, quota_v2);
    } else if (names_cpu(controllers)) {
      walk(mount / "cpu", group, quota_v1);
      walk(mount / controllers, group, quota_v1);
    }
  }
  return limit;
}

namespace {

/// `count`, or what control groups leave of it.
int within_quota(int count) {
#if defined(__linux__)
  if (const auto limit = cgroup_cpu_limit("/proc/self/cgroup", "/sys/fs/cgroup")) {
    count = std::min(count, static_cast<int>(std::ceil(std::min(*limit, 1e6))));
  }
#endif
  return std::max(1, count);
}

}  // namespace

int available_cpus() {
  const std::vector<std::int32_t> cpus = allowed_cpus();
  return within_quota(cpus.empty() ? static_cast<int>(std::thread::hardware_concurrency())
                                   : static_cast<int>(cpus.size()));
}

int default_threads() { return within_quota(machine_topology(1).cores()); }

}  // namespace moesaic
