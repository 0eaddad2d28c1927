#pragma once

/// How a Topology is made of what the system says, apart from asking it.

#include <filesystem>
#include <vector>

#include "moesaic/topology.hpp"

namespace moesaic {

/// What the process may use, and where it says so about the machine.
struct SystemView {
  std::filesystem::path sysfs;        ///< /sys/devices/system
  std::vector<std::int32_t> cpus;     ///< the affinity mask, ascending
  std::vector<std::int32_t> memory;   ///< nodes whose memory is allowed; empty: all
  bool own_policy = false;            ///< a memory policy spreads or directs pages already
  std::vector<std::int32_t> bound{};  ///< nodes of a policy that binds; empty: none does
};

/// The view of the calling thread.
SystemView view_of_process();

/// As machine_topology, from a view.
Topology read_topology(const SystemView& view, std::int32_t nodes);

/// "0-3,8" as 0 1 2 3 8. What is not such a list ends it.
std::vector<std::int32_t> parse_cpu_list(const std::string& text);

/// The CPUs of the calling thread's affinity mask, ascending; empty where the system does not tell.
std::vector<std::int32_t> allowed_cpus();

}  // namespace moesaic
