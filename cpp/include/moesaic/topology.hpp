#pragma once

/// The NUMA nodes of this machine that the process may use: CPUs that are near to the same memory.

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace moesaic {

struct NumaNode {
  std::int32_t id = -1;  ///< the system's number; -1: some CPUs, whose memory is not told apart
  /// Those of the process, one of each core first. CPUs whose own node has no memory that the
  /// process may use count to the nearest one that has.
  std::vector<std::int32_t> cpus;
  std::int32_t cores = 1;  ///< physical cores that `cpus` belong to
};

struct Topology {
  std::vector<NumaNode> nodes;  ///< at least one
  std::string reason;           ///< why these

  /// Whether memory can be bound to the nodes: there are several, and the system has them.
  bool binds() const { return nodes.size() > 1 && nodes.front().id >= 0; }
  std::int32_t cores() const;  ///< of all nodes
  /// Which of `items` is the first that belongs to node `node`, when each has a share in proportion
  /// to its cores; `items` for node = nodes.size().
  std::int64_t first_of(std::size_t node, std::int64_t items) const;
  /// "2 nodes: 0 (16 cores), 1 (16 cores)", or "1 node (2 cores)".
  std::string text() const;
};

/// The nodes as MOESAIC_NUMA (`Tuning::numa`) has them: 0, those of the machine; 1, one for all CPUs;
/// n, those of the machine if it has n, else n groups of CPUs, whose memory is not bound. Honours
/// the affinity of the calling thread, cpusets and the memory policy (numactl) at the first call.
/// The reference stays valid.
const Topology& machine_topology(std::int32_t nodes = 0);

}  // namespace moesaic
