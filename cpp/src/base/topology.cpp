#include "base/topology.hpp"

#include <algorithm>
#include <charconv>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

#include "moesaic/leaf_mutex.hpp"

#if defined(__linux__)
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>
#endif

namespace moesaic {
namespace {

namespace fs = std::filesystem;
using Ids = std::vector<std::int32_t>;

std::string first_line(const fs::path& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

bool contains(const Ids& ids, std::int32_t id) { return std::ranges::find(ids, id) != ids.end(); }

/// The lowest CPU of the core that `cpu` belongs to, as the core's name.
std::int32_t core_of(const fs::path& sysfs, std::int32_t cpu) {
  const fs::path topology = sysfs / "cpu" / ("cpu" + std::to_string(cpu)) / "topology";
  for (const char* file : {"core_cpus_list", "thread_siblings_list"}) {  // new and old name
    const Ids siblings = parse_cpu_list(first_line(topology / file));
    if (contains(siblings, cpu)) return siblings.front();
  }
  return cpu;
}

/// Puts one CPU of each core first, ascending, and the siblings behind; counts the cores.
void order_by_core(const fs::path& sysfs, NumaNode& node) {
  std::ranges::sort(node.cpus);
  Ids cores;
  Ids siblings;
  Ids first;
  for (const std::int32_t cpu : node.cpus) {
    const std::int32_t core = core_of(sysfs, cpu);
    const bool known = contains(cores, core);
    (known ? siblings : first).push_back(cpu);
    if (!known) cores.push_back(core);
  }
  node.cores = std::max(1, static_cast<std::int32_t>(first.size()));
  node.cpus = std::move(first);
  node.cpus.insert(node.cpus.end(), siblings.begin(), siblings.end());
}

/// A node of the machine, before it is known which the process may use.
struct Found {
  std::int32_t id;
  Ids cpus;  ///< of the process
  bool memory;
  Ids distances;  ///< to the nodes found, in their order
};

std::vector<Found> find_nodes(const SystemView& view) {
  std::vector<Found> found;
  const fs::path folder = view.sysfs / "node";
  const std::string with_memory = first_line(folder / "has_memory");
  const Ids memory = parse_cpu_list(with_memory);
  for (const std::int32_t id : parse_cpu_list(first_line(folder / "online"))) {
    const fs::path node = folder / ("node" + std::to_string(id));
    Ids cpus = parse_cpu_list(first_line(node / "cpulist"));
    std::erase_if(cpus, [&](std::int32_t cpu) { return !contains(view.cpus, cpu); });
    const bool usable = (with_memory.empty() || contains(memory, id)) &&
                        (view.memory.empty() || contains(view.memory, id)) &&
                        (view.bound.empty() || contains(view.bound, id));
    Ids distances;
    std::ifstream file(node / "distance");
    for (std::int32_t distance = 0; file >> distance;) distances.push_back(distance);
    found.push_back({id, std::move(cpus), usable, std::move(distances)});
  }
  return found;
}

/// The nodes that have memory and CPUs of the process; CPUs without memory go to the nearest of
/// them, or to the nearest that has memory at all.
std::vector<NumaNode> usable_nodes(std::vector<Found> found) {
  const auto nearest = [&found](const Found& from, bool with_cpus) -> Found* {
    Found* best = nullptr;
    std::int32_t least = 0;
    for (std::size_t i = 0; i < found.size(); ++i) {
      Found& to = found[i];
      if (!to.memory || (with_cpus && to.cpus.empty())) continue;
      const std::int32_t distance = i < from.distances.size() ? from.distances[i] : 255;
      if (best == nullptr || distance < least) {
        best = &to;
        least = distance;
      }
    }
    return best;
  };
  for (Found& node : found) {
    if (node.memory || node.cpus.empty()) continue;
    Found* to = nearest(node, true);
    if (to == nullptr) to = nearest(node, false);
    if (to == nullptr) return {};
    to->cpus.insert(to->cpus.end(), node.cpus.begin(), node.cpus.end());
    node.cpus.clear();
  }
  std::vector<NumaNode> nodes;
  for (Found& node : found) {
    if (node.memory && !node.cpus.empty()) nodes.push_back({node.id, std::move(node.cpus)});
  }
  return nodes;
}

NumaNode all_cpus(const SystemView& view) {
  NumaNode node{.cpus = view.cpus};
  order_by_core(view.sysfs, node);
  return node;
}

/// `count` groups of whole cores that count alike, whether or not they divide evenly; all CPUs in
/// each where there are fewer cores.
std::vector<NumaNode> cut(const SystemView& view, std::int32_t count) {
  const NumaNode all = all_cpus(view);
  std::vector<NumaNode> nodes(static_cast<std::size_t>(count));
  if (all.cores < count) {
    for (NumaNode& node : nodes) node.cpus = all.cpus;
    return nodes;
  }
  Ids cores;  // in the order of their first CPUs
  for (std::int32_t i = 0; i < all.cores && i < std::ssize(all.cpus); ++i) {
    cores.push_back(core_of(view.sysfs, all.cpus[static_cast<std::size_t>(i)]));
  }
  for (const std::int32_t cpu : all.cpus) {
    const auto at = std::ranges::find(cores, core_of(view.sysfs, cpu)) - cores.begin();
    nodes[static_cast<std::size_t>(at * count / std::ssize(cores))].cpus.push_back(cpu);
  }
  for (NumaNode& node : nodes) {
    order_by_core(view.sysfs, node);
    node.cores = all.cores / count;
  }
  return nodes;
}

}  // namespace

std::int32_t Topology::cores() const {
  return std::accumulate(nodes.begin(), nodes.end(), 0,
                         [](std::int32_t sum, const NumaNode& node) { return sum + node.cores; });
}

std::int64_t Topology::first_of(std::size_t node, std::int64_t items) const {
  std::int64_t before = 0;
  for (std::size_t i = 0; i < node; ++i) before += nodes[i].cores;
  return items * before / cores();
}

std::string Topology::text() const {
  const auto count = [](std::int64_t n, const char* what) {
    return std::to_string(n) + " " + what + (n == 1 ? "" : "s");
  };
  if (nodes.size() == 1) return "1 node (" + count(cores(), "core") + ")";
  std::string text = count(std::ssize(nodes), "node") + ": ";
  for (std::size_t i = 0; i < nodes.size(); ++i) {
    const std::string name =
        nodes[i].id >= 0 ? std::to_string(nodes[i].id) : "group " + std::to_string(i);
    text += (i == 0 ? "" : ", ") + name + " (" + count(nodes[i].cores, "core") + ")";
  }
  return text;
}

std::vector<std::int32_t> parse_cpu_list(const std::string& text) {
  constexpr std::int32_t kMost = 1 << 20;
  Ids ids;
  const char* at = text.data();
  const char* const end = at + text.size();
  while (at != end) {
    std::int32_t first = 0;
    auto parsed = std::from_chars(at, end, first);
    if (parsed.ec != std::errc{} || first < 0) break;
    std::int32_t last = first;
    if (parsed.ptr != end && *parsed.ptr == '-') {
      parsed = std::from_chars(parsed.ptr + 1, end, last);
      if (parsed.ec != std::errc{}) break;
    }
    for (std::int32_t id = first; id <= std::min(last, kMost); ++id) ids.push_back(id);
    at = parsed.ptr;
    if (at == end || *at != ',') break;
    ++at;
  }
  return ids;
}

std::vector<std::int32_t> allowed_cpus() {
  Ids cpus;
#if defined(__linux__)
  // The kernel refuses a mask smaller than its own.
  for (std::size_t sets = 1; sets <= 1024 && cpus.empty(); sets *= 2) {
    std::vector<cpu_set_t> mask(sets);
    const std::size_t bytes = sets * sizeof(cpu_set_t);
    const bool ok = sched_getaffinity(0, bytes, mask.data()) == 0;
    const bool too_small = !ok && errno == EINVAL;
    for (std::size_t cpu = 0; ok && cpu < 8 * bytes; ++cpu) {
      if (CPU_ISSET_S(cpu, bytes, mask.data())) cpus.push_back(static_cast<std::int32_t>(cpu));
    }
    if (!too_small) break;
  }
#endif
  return cpus;
}

SystemView view_of_process() {
  SystemView view{.sysfs = "/sys/devices/system", .cpus = allowed_cpus(), .memory = {}};
  if (view.cpus.empty()) {
    view.cpus.resize(std::max(1U, std::thread::hardware_concurrency()));
    std::iota(view.cpus.begin(), view.cpus.end(), 0);
  }
#if defined(__linux__) && defined(SYS_get_mempolicy)
  constexpr unsigned long kBits = 1024;
  constexpr unsigned long kWordBits = 8 * sizeof(unsigned long);
  constexpr unsigned long kMemoryAllowed = 1 << 2;  // MPOL_F_MEMS_ALLOWED
  constexpr int kModeBits = 0xff;                   // the others are flags
  enum : int { kDefault = 0, kBind = 2, kLocal = 4 };
  unsigned long mask[kBits / kWordBits] = {};
  const auto ids = [&mask] {
    Ids set;
    for (unsigned long id = 0; id < kBits; ++id) {
      if ((mask[id / kWordBits] >> (id % kWordBits) & 1) != 0) {
        set.push_back(static_cast<std::int32_t>(id));
      }
    }
    return set;
  };
  if (syscall(SYS_get_mempolicy, nullptr, mask, kBits, nullptr, kMemoryAllowed) == 0) {
    view.memory = ids();
  }
  int mode = kDefault;
  std::ranges::fill(mask, 0UL);
  if (syscall(SYS_get_mempolicy, &mode, mask, kBits, nullptr, 0UL) == 0) {
    mode &= kModeBits;
    if (mode == kBind) view.bound = ids();
    view.own_policy = mode != kDefault && mode != kBind && mode != kLocal;
  }
#endif
  return view;
}

Topology read_topology(const SystemView& view, std::int32_t nodes) {
  Topology topology;
  if (nodes == 1) {
    topology.nodes = {all_cpus(view)};
    topology.reason = "not told apart (MOESAIC_NUMA=off)";
    return topology;
  }
  topology.nodes = usable_nodes(find_nodes(view));
  for (NumaNode& node : topology.nodes) order_by_core(view.sysfs, node);
  const auto found = static_cast<std::int32_t>(topology.nodes.size());
  if (nodes > 1) {
    topology.reason = "as many as MOESAIC_NUMA asks for";
    if (found == nodes && !view.own_policy) return topology;
    topology.nodes = cut(view, nodes);
    topology.reason = "groups of CPUs, as MOESAIC_NUMA asks for; their memory is not bound";
    return topology;
  }
  if (found <= 1 || view.own_policy) {
    const std::int32_t id = found == 1 ? topology.nodes.front().id : -1;
    topology.nodes = {all_cpus(view)};
    topology.nodes.front().id = id;
    topology.reason = found > 1    ? "a memory policy of the process places its pages"
                      : found == 1 ? "the process may use the memory of one node"
                                   : "the system tells of no nodes";
    return topology;
  }
  topology.reason = "nodes with CPUs and memory of the process";
  return topology;
}

const Topology& machine_topology(std::int32_t nodes) {
  struct Known {
    LeafMutex mutex;
    std::map<std::int32_t, std::unique_ptr<const Topology>> topologies;
  };
  // Never destroyed: workers may outlive static destructors.
  static Known& known = *new Known;
  {
    const std::lock_guard lock(known.mutex);
    const auto at = known.topologies.find(nodes);
    if (at != known.topologies.end()) return *at->second;
  }
  // Files are read outside of the mutex, which is for short work.
  auto read = std::make_unique<const Topology>(read_topology(view_of_process(), nodes));
  const std::lock_guard lock(known.mutex);
  return *known.topologies.try_emplace(nodes, std::move(read)).first->second;
}

}  // namespace moesaic
