/// The first process of a NUMA machine that exists in QEMU alone. It loads a layer as a program would,
/// and asks the kernel where each page of the weights lies and on which node each thread runs. Each
/// case runs in a process of its own, since the library asks for the nodes once. run.py makes the
/// machine; the kernel's command line says what it expects (guest.expect=case=nodes;..).

#include <fcntl.h>
#include <linux/mempolicy.h>
#include <linux/reboot.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <exception>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>
#include <vector>

#include "moesaic/moesaic.hpp"

namespace {

using namespace moesaic;

constexpr std::int64_t kExperts = 8, kHidden = 512, kIntermediate = 512, kTokens = 3, kTopK = 2;
constexpr double kRemoteShare = 0.02;  ///< of weight bytes, at most
constexpr std::size_t kPageBytes = 4096;

std::string read_file(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path);
  if (!(file << text << std::flush)) std::printf("  cannot write %s\n", path.c_str());
}

std::vector<float> random_values(std::int64_t count, std::uint32_t seed) {
  std::vector<float> values(static_cast<std::size_t>(count));
  for (float& value : values) {
    seed = seed * 1664525U + 1013904223U;
    value = static_cast<float>(seed >> 8) / static_cast<float>(1 << 24) - 0.5F;
  }
  return values;
}

/// Dense experts of a layer and one call of it.
struct Problem {
  std::vector<float> gate = random_values(kExperts * kIntermediate * kHidden, 1);
  std::vector<float> up = random_values(kExperts * kIntermediate * kHidden, 2);
  std::vector<float> down = random_values(kExperts * kHidden * kIntermediate, 3);
  std::vector<float> x = random_values(kTokens * kHidden, 4);
  std::vector<std::int32_t> ids = {0, 5, 3, 7, 5, 1};
  std::vector<float> weights = random_values(kTokens * kTopK, 5);

  ExpertStack load(ThreadPool& pool) const {
    LoadOptions options;
    options.backend = &backend_for(Device{});
    options.pool = &pool;
    const auto view = [](const std::vector<float>& values, std::int64_t rows, std::int64_t cols) {
      return ConstTensorView{values.data(), DType::F32, {kExperts, rows, cols}};
    };
    return ExpertStack::from_dense_stacks(view(gate, kIntermediate, kHidden),
                                          view(up, kIntermediate, kHidden),
                                          view(down, kHidden, kIntermediate), options);
  }

  std::vector<float> run(const ExpertStack& stack, const std::shared_ptr<ThreadPool>& pool) {
    std::vector<float> out(x.size());
    Context context(backend_for(Device{}), Tuning{}, pool);
    LayerRef layer;
    layer.stack = &stack;
    ForwardIo io;
    io.x = {x.data(), DType::F32, {kTokens, kHidden}};
    io.routing = {ids.data(), weights.data(), kTokens, kTopK};
    io.out = {out.data(), DType::F32, {kTokens, kHidden}};
    Workspace workspace(workspace_bytes(context, layer, kTopK, kTokens));
    moe_forward(context, layer, io, workspace);
    return out;
  }
};

/// Pages of a role by whether they lie on the node that their panels are dealt to.
struct Placement {
  std::int64_t right = 0, wrong = 0;

  void add(const WeightRef& ref, const Topology& topology) {
    const PanelShares& shares = *ref.shares;
    for (std::int32_t s = 0; s < shares.count; ++s) {
      const auto bytes = static_cast<std::size_t>(
          shares.slots * (shares.first[s + 1] - shares.first[s]) * ref.row_stride);
      const std::byte* const begin = shares.table[s * shares.slots];
      for (std::size_t at = 0; at < bytes; at += kPageBytes) {
        void* page = const_cast<std::byte*>(begin + at);
        int node = -1;
        syscall(SYS_move_pages, 0, 1UL, &page, nullptr, &node, 0);
        (node == topology.nodes[static_cast<std::size_t>(s)].id ? right : wrong) += 1;
      }
    }
  }
};

/// Runs chunks for each node; which of them ran on a CPU of another.
std::int64_t chunks_elsewhere(ThreadPool& pool, std::int64_t per_node) {
  std::atomic<std::int64_t> elsewhere{0};
  pool.parallel_for_nodes(per_node, [&](std::int64_t chunk, int) {
    const auto& cpus = pool.topology().nodes[static_cast<std::size_t>(chunk / per_node)].cpus;
    unsigned cpu = 0;
    syscall(SYS_getcpu, &cpu, nullptr, nullptr);
    if (std::ranges::find(cpus, static_cast<std::int32_t>(cpu)) == cpus.end()) ++elsewhere;
    volatile std::int64_t sum = 0;
    for (std::int64_t i = 0; i < 20000; ++i) sum = sum + i;
  });
  return elsewhere.load();
}

/// One case in a process that asks for its nodes for the first time.
bool run_case(const std::string& expected) {
  const Topology& topology = machine_topology();
  bool good = topology.text() == expected;
  std::printf("  nodes: %s (%s)\n", topology.text().c_str(), topology.reason.c_str());
  if (!good) std::printf("  WRONG: expected %s\n", expected.c_str());

  Problem problem;
  const auto one = std::make_shared<ThreadPool>(topology.cores(), machine_topology(1));
  const ExpertStack together = problem.load(*one);
  const std::vector<float> want = problem.run(together, one);
  if (!topology.binds()) return good && together.up().ref.shares == nullptr;

  // Nobody helps another node: clocks and hosts of a guest say nothing about when that is worth it.
  const auto pool =
      std::make_shared<ThreadPool>(topology.cores(), topology, std::chrono::seconds(1));
  const ExpertStack dealt = problem.load(*pool);
  for (const RoleReport& role : dealt.report().roles) {
    if (role.role == Role::Up) std::printf("  report: %s\n", role.reason.c_str());
    good = good && role.reason.ends_with(", pages bound");
  }
  const bool same = problem.run(dealt, pool) == want;
  if (!same) std::printf("  WRONG: the results differ\n");

  Placement pages;
  for (const RoleWeights* role : {&dealt.gate(), &dealt.up(), &dealt.down()}) {
    pages.add(role->ref, topology);
  }
  const double remote =
      static_cast<double>(pages.wrong) / static_cast<double>(pages.right + pages.wrong);
  std::printf("  pages: %lld on their node, %lld not (%.2f %%)\n",
              static_cast<long long>(pages.right), static_cast<long long>(pages.wrong),
              100 * remote);
  // The caller may be moved by the system; workers may not.
  const std::int64_t per_node = 200;
  const std::int64_t total = per_node * std::ssize(topology.nodes);
  const std::int64_t elsewhere = chunks_elsewhere(*pool, per_node);
  std::printf("  tasks: %lld of %lld on another node\n", static_cast<long long>(elsewhere),
              static_cast<long long>(total));
  ThreadPool helping(topology.cores(), topology);
  std::printf("  tasks where idle threads help: %lld of %lld on another node\n",
              static_cast<long long>(chunks_elsewhere(helping, per_node)),
              static_cast<long long>(total));
  const double off = static_cast<double>(elsewhere) / static_cast<double>(total);
  if (remote > kRemoteShare || off > kRemoteShare) std::printf("  WRONG: too many are remote\n");
  return good && same && remote <= kRemoteShare && off <= kRemoteShare;
}

/// What numactl and a container would do to the process, by the name of the case.
bool set_up(const std::string& name) {
  unsigned long nodes = 0;
  if (name == "affinity") {  // taskset, numactl --cpunodebind=0
    cpu_set_t mask;
    CPU_ZERO(&mask);
    CPU_SET(0, &mask);
    CPU_SET(1, &mask);
    return sched_setaffinity(0, sizeof(mask), &mask) == 0;
  }
  if (name == "membind") {  // numactl --membind=0
    nodes = 1;
    return syscall(SYS_set_mempolicy, MPOL_BIND, &nodes, 64UL) == 0;
  }
  if (name == "interleave") {  // numactl --interleave=0,1
    nodes = 3;
    return syscall(SYS_set_mempolicy, MPOL_INTERLEAVE, &nodes, 64UL) == 0;
  }
  if (name == "cpuset") {  // a container that is given one node
    const std::string group = "/sys/fs/cgroup/one";
    mount("cgroup", "/sys/fs/cgroup", "cgroup2", 0, nullptr);
    write_file("/sys/fs/cgroup/cgroup.subtree_control", "+cpuset");
    mkdir(group.c_str(), 0755);
    write_file(group + "/cpuset.mems", "1");
    write_file(group + "/cgroup.procs", std::to_string(getpid()));
    return true;
  }
  return name == "auto";
}

bool run_in_process(const std::string& name, const std::string& expected) {
  std::printf("case %s\n", name.c_str());
  std::fflush(stdout);
  const pid_t child = fork();
  if (child == 0) {
    bool good = false;
    try {
      good = set_up(name) && run_case(expected);
    } catch (const std::exception& error) {
      std::printf("  %s\n", error.what());
    }
    std::printf("  %s\n", good ? "good" : "FAILED");
    std::fflush(stdout);
    _exit(good ? 0 : 1);
  }
  int status = 1;
  waitpid(child, &status, 0);
  return status == 0;
}

/// Pairs of "name=nodes;name=nodes" in a word of the command line, where ~ stands for a blank.
std::vector<std::array<std::string, 2>> expectations() {
  const std::string line = read_file("/proc/cmdline");
  const std::string key = "guest.expect=";
  std::string text = line.substr(line.find(key) + key.size());
  text = text.substr(0, text.find_first_of(" \n"));
  std::ranges::replace(text, '~', ' ');
  std::vector<std::array<std::string, 2>> cases;
  while (!text.empty()) {
    const std::size_t end = std::min(text.find(';'), text.size());
    const std::size_t equals = text.find('=');
    cases.push_back({text.substr(0, equals), text.substr(equals + 1, end - equals - 1)});
    text = text.substr(std::min(end + 1, text.size()));
  }
  return cases;
}

}  // namespace

int main() {
  mkdir("/proc", 0755);
  mkdir("/sys", 0755);
  mount("proc", "/proc", "proc", 0, nullptr);
  mount("sysfs", "/sys", "sysfs", 0, nullptr);
  bool good = true;
  const auto cases = expectations();
  for (const auto& [name, nodes] : cases) good = run_in_process(name, nodes) && good;
  std::printf(good && !cases.empty() ? "GUEST PASSED\n" : "GUEST FAILED\n");
  std::fflush(stdout);
  sync();
  reboot(RB_POWER_OFF);
}
